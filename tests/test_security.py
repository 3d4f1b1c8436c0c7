"""What .github/SECURITY.md promises, clause by clause."""

import ast
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

import llava_accel.train as verb
from helpers.runs import PARITY, on_tiny, tables, talk, write_records
from llava_accel.console.command_line import start
from llava_accel.recipe import make_recipe
from llava_accel.recipe.toml import to_toml

PACKAGE = PARITY.parents[1] / "llava_accel"


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """File, dotted name and node of every call in the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield path.name, ast.unparse(node.func), node


def keywords(call: ast.Call) -> dict[str, str]:
    return {word.arg: ast.unparse(word.value) for word in call.keywords if word.arg}


# No code from a model folder runs; pickles hold tensors and nothing else.


def test_pickles_are_read_with_weights_only() -> None:
    loads = [(file, keywords(call)) for file, name, call in calls() if name == "torch.load"]
    assert loads, "the test found no torch.load to look at"
    assert all(words.get("weights_only") == "True" for _, words in loads), loads
    others = ("pickle.load", "pickle.loads", "Unpickler", "joblib.load", "dill.load", "marshal.loads", "yaml.load")
    assert not [(file, name) for file, name, _ in calls() if name in others]
    assert not [(file, words) for file, name, call in calls() if "allow_pickle" in (words := keywords(call))]


def test_no_text_is_run_as_a_program() -> None:
    named = [
        (file, name) for file, name, _ in calls() if name in ("eval", "exec", "compile", "os.system", "__import__")
    ]
    assert named == []
    trusting = [file for file, _, call in calls() if keywords(call).get("trust_remote_code", "False") != "False"]
    processes = [(file, call) for file, name, call in calls() if name.startswith(("subprocess.", "os."))]
    shells = [file for file, call in processes if keywords(call).get("shell", "False") != "False"]
    assert trusting == [] and shells == []


@pytest.fixture
def with_code(llava_folder: Path, tmp_path: Path) -> Path:
    """A good LLaVA whose configs name code that lies beside them."""
    base = Path(shutil.copytree(llava_folder, tmp_path / "base"))
    code = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
    (base / "evil.py").write_text(code + "class Evil:\n    pass\n")
    for name in ("config.json", "tokenizer_config.json", "processor_config.json", "generation_config.json"):
        fields = json.loads((base / name).read_text())
        autos = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor", "AutoImageProcessor")
        named = {auto: "evil.Evil" for auto in autos} | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
        (base / name).write_text(json.dumps(fields | {"auto_map": named, "custom_generate": "evil.py"}))
    return base


def test_code_in_a_model_folder_is_not_run(with_code: Path, tmp_path: Path) -> None:
    data = write_records(tmp_path / "data.json", [talk(0, "What?", "A cat", "t0.png")])
    assert verb.train(make_recipe(on_tiny(with_code, tmp_path, data))).step == 1
    assert not (tmp_path / "ran").exists()
    sys.path.insert(0, str(with_code))
    try:
        __import__("evil")  # the trap itself works
    finally:
        sys.path.remove(str(with_code))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch RAN') }}",
        "{% for n in range(10 ** 9) %}{{ n }}{% endfor %}",
    ],
)
def test_a_chat_template_cannot_reach_out_of_its_box(llava_folder: Path, tmp_path: Path, template: str) -> None:
    base = Path(shutil.copytree(llava_folder, tmp_path / "base"))
    (base / "chat_template.jinja").write_text(template.replace("RAN", str(tmp_path / "ran")))
    data = write_records(tmp_path / "data.json", [talk(0, "What?", "A cat", "t0.png")])
    with pytest.raises(
        ValueError,
        match=r"chat template (refuses|drops).*model\.template|model\.template: the chat template (refuses|drops)",
    ):
        verb.train(make_recipe(on_tiny(base, tmp_path, data, model={"template": "auto"})))
    assert not (tmp_path / "ran").exists()


# Nothing of the data reaches a terminal or a page unescaped; tokens are neither printed nor saved.

EVIL = "<script>alert(1)</script>\x1b[31mred\x07\x9b2J\u202eback\u200f\u061c\u2028[bold]b[/bold]\x00\x7f\r"
TOKENS = {name: f"hf_{name}Secret0123456789abcdef" for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")}


def started(name: str, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a verb prints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        try:
            start(name)
        except SystemExit as end:
            assert end.code in (0, 1, None), capsys.readouterr().err
    captured = capsys.readouterr()
    return captured.out + captured.err


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipe of a run on hostile data, which ends in an evaluation, where tokens lie in the environment."""
    for name, token in TOKENS.items():
        monkeypatch.setenv(name, token)
    shutil.copytree(PARITY / "images", tmp_path / "images")
    image = "a\x1b[31m<b>.png"
    shutil.copyfile(PARITY / "images" / "t0.png", tmp_path / "images" / image)
    records = [talk(EVIL, EVIL, EVIL, image), talk(1, EVIL, EVIL, "none" + image), talk(2, "Q", "A", "t1.png")]
    records[0] |= {"id": EVIL, "question": EVIL, "question_type": EVIL, "answer_type": EVIL, "answers": {EVIL: 3}}
    write_records(tmp_path / "data.json", records)
    data = {
        "eval": str(tmp_path / "data.json"),
        "images": str(tmp_path / "images"),
        "on_bad_record": "skip",
        "max_bad": 1.0,
    }
    settings = tables(tmp_path, tmp_path / "data.json", data=data, eval={"at_start": True})
    (tmp_path / "recipe.toml").write_text(to_toml(settings))
    return tmp_path / "recipe.toml"


def assert_harmless(text: str) -> None:
    bad = {character for character in text if unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp")} - {
        "\n",
        "\t",
    }
    assert bad == set(), f"{bad!r} reached the terminal"


@pytest.mark.usefixtures("plots")
def test_hostile_data_and_tokens_leave_no_trace(
    evil: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = evil.parent / "run"
    said = started("check", capsys, str(evil))
    said += started("train", capsys, str(evil))
    said += started("report", capsys, str(run))
    monkeypatch.setattr("builtins.input", lambda _: "/quit")
    said += started("chat", capsys, "--adapter", str(run), "--once", EVIL.replace("\x00", ""))
    assert "script" in said, "the test needs the data to be shown"
    assert_harmless(said)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;" in page and "<script>alert" not in page
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200f\u202e\u2028]", page)
    for card in run.rglob("README.md"):
        assert "<script>" not in card.read_text() and "\x1b" not in card.read_text()
    files = [path for path in evil.parent.rglob("*") if path.is_file()]
    assert len(files) > 30
    for token in TOKENS.values():
        assert token not in said
        assert not [path for path in files if token.encode() in path.read_bytes()]


def test_a_token_on_the_command_line_is_not_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = TOKENS["HF_TOKEN"]
    monkeypatch.setattr(sys, "argv", ["train", f"https://user:{token}@example.org/x", f"--token={token}"])
    verb.train(make_recipe(tables(tmp_path, train={"max_steps": 1})))
    text = (tmp_path / "run" / "environment.json").read_text()
    assert token not in text and "hf_..." in text


# No image outside data.images (tests/helpers/broken_images.py), and no temporary file that others can read.


def test_a_report_shows_no_image_from_outside(
    lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(lora_run, tmp_path / "run"))
    Image.new("RGB", (8, 8), "red").save(tmp_path / "secret.png")
    for file in (run / "predictions").glob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        beside = [other for row in rows for other in (*row.get("nearest", []), row.get("other", {}))]
        for row in [*rows, *beside]:
            row["image"] = f"{PARITY}/images/../../../../../..{tmp_path}/secret.png"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    started("report", capsys, str(run))
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "lies outside" in page and "data:image/jpeg" not in page


def test_temporary_files_and_the_cache_are_the_users_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        verb.train(make_recipe(tables(tmp_path, train={"max_steps": 1})))
    finally:
        os.umask(before)
    made = [tmp_path / "cache", *(tmp_path / "cache").rglob("*.arrow"), *(tmp_path / "cache").rglob("*.npz")]
    assert len(made) >= 3
    assert [path for path in made if stat.S_IMODE(path.stat().st_mode) & 0o077] == []


def test_no_temporary_file_has_a_name_that_others_can_foresee() -> None:
    known = [(file, name) for file, name, _ in calls() if name in ("tempfile.mktemp", "mktemp")]
    fixed = [path.name for path in PACKAGE.rglob("*.py") if re.search(r"""["'](/tmp|/var/tmp)/""", path.read_text())]
    assert known == [] and fixed == []


def test_the_security_page_names_a_test_for_each_promise() -> None:
    section = (PACKAGE.parent / ".github/SECURITY.md").read_text().split("\n## What is promised\n")[1].split("\n## ")[0]
    named = set(re.findall(r"`(tests/[\w/.]+\.py)`", section))
    assert len(named) >= 3 and all((PACKAGE.parent / name).is_file() for name in named)
    listed = subprocess.run(["grep", "-c", "^| ", "-"], input=section, capture_output=True, text=True).stdout
    assert int(listed) >= 7
