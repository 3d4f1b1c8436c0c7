"""`llava-accel init`: from data to a recipe that loads, is checked and trains, whatever the data are."""

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from helpers.runs import PARITY, metrics, talk, write_records
from helpers.tiled import KIT
from helpers.traces import trace_any_rows
from helpers.verbs import Ended, assert_refused, start
from llava_accel.advice import sizing
from llava_accel.recipe import Recipe, load_recipe

RECIPES = PARITY.parents[1] / "recipes"
BASE = str(PARITY.parents[1] / "llava_accel" / "quickstart" / "base")
LONG = "a red square stands on the left of two blue circles"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user: a folder of one's own, and a cache. A step of each base is traced once; see advice/test_sizing.py."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sizing, "trace_step", trace_any_rows)


def write_images(folder: str, count: int) -> None:
    Path(folder).mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (32, 32), (number, 90, 9)).save(f"{folder}/{number}.png")


def write_data(count: int, a_image: int = 1, answer: str = "red", name: str = "data/train.json", **more: Any) -> str:
    """Records with so many on each image; the images lie in the folder images beside the file."""
    if not Path(name).parent.exists():
        write_images(str(Path(name).parent / "images"), count // a_image)
    records = [talk(n, f"What is {n}?", answer, f"{n // a_image}.png") | more for n in range(count)]
    return str(write_records(Path(name), records))


def init(*words: str, base: str = BASE) -> Ended:
    return start("init", "mine.toml", *words, *(["--base", base] if base else []))


def made(*words: str, base: str = BASE) -> Recipe:
    ended = init(*words, base=base)
    assert ended.code == 0, ended.err
    return load_recipe("mine.toml")


def test_a_small_table_becomes_a_run_that_is_checked() -> None:
    ended = init("--data", write_data(200))
    assert (ended.code, ended.err) == (0, ""), ended.err
    recipe = load_recipe("mine.toml")
    assert recipe.data.images == "data/images" and "the images of data/train.json are in data/images" in ended.out
    assert "no --images: they were found there" in (written := Path("mine.toml").read_text())
    assert "180 records to train on: about 184 steps" in written, "8 passes, whose last step is not a full one"
    assert recipe.train.epochs == 8 and recipe.train.per_device_batch_size == 8 == recipe.train.per_device_batch_size
    assert (recipe.eval.metric, recipe.model.template, recipe.model.quantization.bits) == ("exact_match", "v1", 16)
    assert recipe.data.eval_fraction == 0.1 and not recipe.data.share_prefix
    assert "data: 200 records, 200 images" in ended.out and "task: vqa (short answers" in ended.out
    commands = [shlex.split(line) for line in ended.out.splitlines() if line.startswith("  llava-accel")]
    assert [words[1] for words in commands] == ["check", "train", "evaluate"]
    checked = start(*commands[0][1:])
    assert (checked.code, checked.err) == (0, ""), checked.out
    lines = Path("mine.toml").read_text().splitlines()
    keys = [line for line in lines if " = " in line.partition("#")[0]]
    assert [line for line in keys if "#" not in line] == [f'base = "{BASE}"'], "which the user has named"
    assert len(keys) < 25 and max(map(len, lines)) <= 120


@pytest.mark.parametrize(
    ("answer", "more", "words", "metric"),
    [
        ("red", {"answers": {"red": 3, "blue": 1}}, [], "vqa_accuracy"),
        ("A", {"choices": ["red", "blue"]}, [], "multiple_choice"),
        (LONG, {}, [], "loss"),
        (LONG, {}, ["--task", "vqa"], "exact_match"),
        ("red", {}, ["--task", "caption"], "loss"),
    ],
)
def test_answers_decide_how_they_are_judged(answer: str, more: dict[str, Any], words: list[str], metric: str) -> None:
    recipe = made("--data", write_data(40, answer=answer, **more), *words)
    assert recipe.eval.metric == metric
    assert recipe.eval.max_new_tokens == (8 if answer != LONG else recipe.eval.max_new_tokens)
    assert recipe.eval.max_new_tokens >= len(answer.split())


def write_pairs(count: int, **more: Any) -> str:
    write_images("data/images", count)
    rows = [{"image": f"{n}.png", "question": f"What is {n}?", "chosen": "red", "rejected": LONG} for n in range(count)]
    return str(write_records(Path("data/train.json"), [row | more for row in rows]))


def test_pairs_of_answers_become_a_recipe_for_preferences() -> None:
    ended = init("--data", write_pairs(60))
    assert ended.code == 0, ended.err
    recipe, ours = load_recipe("mine.toml"), load_recipe(RECIPES / "dpo_lora.toml")
    assert "task: preference (all records have a rejected answer" in ended.out
    assert (recipe.train.objective, recipe.eval.metric) == ("dpo", "pair_accuracy")
    for table in ("preference", "optim"):
        assert getattr(recipe, table) == getattr(ours, table)
    assert (recipe.model.lora, recipe.model.train_projector) == (ours.model.lora, ours.model.train_projector)
    assert recipe.data.max_length >= 64 and "dpo_lora.toml" in Path("mine.toml").read_text()
    checked = start("check", "mine.toml")
    assert (checked.code, checked.err) == (0, ""), checked.out


def test_answers_alone_are_learned_from_pairs_where_the_task_says_so() -> None:
    recipe = made("--data", write_pairs(40), "--task", "vqa")
    assert (recipe.train.objective, recipe.eval.metric) == ("answers", "exact_match")
    said = start("check", "mine.toml").out
    assert "40 rejected answers are not learned from" in said and 'set train.objective = "dpo"' in " ".join(
        said.split()
    )


def test_records_without_a_rejected_answer_are_no_preferences() -> None:
    assert_refused(init("--data", write_data(40), "--task", "preference"), ['no "rejected" answer', "--task"])


def test_questions_on_one_image_share_it() -> None:
    recipe = made("--data", write_data(160, 4))
    assert recipe.data.share_prefix
    assert recipe.train.per_device_batch_size * recipe.train.accumulation_steps == 4 * 8


def test_held_out_data_are_named_and_measured() -> None:
    train = write_data(40)
    turns: dict[str, Any] = {"conversations": talk(1, "x " * 300, LONG, "1.png")["conversations"]}
    recipe = made("--data", train, "--eval", write_data(10, name="data/held_out.json", **turns))
    assert recipe.data.eval == "data/held_out.json" and not recipe.data.eval_fraction
    assert recipe.data.max_length > 300, "of the longer ones"
    assert recipe.eval.max_new_tokens > 8 and start("check", "mine.toml").code == 0


def test_several_files_have_a_folder_each() -> None:
    data = [write_data(30, name="one/a.json"), write_data(30, name="two/b.json")]
    recipe = made("--data", *data)
    assert not isinstance(recipe.data.train, str)
    found = [(source.path, source.images, source.weight) for source in recipe.data.train]
    assert found == [("one/a.json", "one/images", 1.0), ("two/b.json", "two/images", 1.0)]
    assert start("check", "mine.toml").code == 0


def test_a_folder_of_parquet_is_data_too_and_the_recipe_may_come_last(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    write_data(30)
    records = json.loads(Path("data/train.json").read_text())
    Path("tables").mkdir()
    parquet.write_table(pa.Table.from_pylist(records), "tables/a.parquet")
    assert start("init", "--base", BASE, "--images", "data/images", "--data", "tables", "mine.toml").code == 0
    assert load_recipe("mine.toml").data.train == "tables"


def test_a_base_with_a_template_of_its_own_keeps_it(tmp_path: Path, llava_folder: Path) -> None:
    import shutil

    base = shutil.copytree(llava_folder, tmp_path / "base")
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for part in m['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
        "{% endif %}{{ '</s>' if m['role'] == 'assistant' }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    (base / "chat_template.jinja").write_text(template)
    data = write_data(30)
    assert made("--data", data, base=str(base)).model.template == "auto"
    assert start("check", "mine.toml", fresh=True).code == 0
    assert made("--data", data, "--force", base=str(llava_folder)).model.template == "v1"


def test_records_that_a_base_cannot_hold_are_left_out(llava_folder: Path) -> None:
    data = write_data(30)
    records = json.loads(Path(data).read_text())
    write_records(Path(data), [*records, talk("long", "Say much.", "x" * 700, "1.png")])
    recipe = made("--data", data, base=str(llava_folder))
    assert (recipe.data.max_length, recipe.data.on_too_long) == (512, "skip")
    assert start("check", "mine.toml").code == 0
    write_records(Path(data), [talk("long", "Say much.", "x" * 700, "1.png")])
    assert_refused(init("--data", data, "--force", base=str(llava_folder)), ["the base takes 512. Shorten the records"])


@pytest.mark.slow
def test_a_base_that_cannot_be_had_is_assumed_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ended = init("--data", write_data(40), "--gpu", "24", base="")
    assert ended.code == 0, ended.err
    assert "assumed: the published sizes of llava-hf/llava-1.5-7b-hf" in ended.out
    assert "llava-hf/llava-1.5-7b-hf is not on this machine" in ended.out
    recipe, text = load_recipe("mine.toml"), Path("mine.toml").read_text()
    assert recipe.model.base == "llava-hf/llava-1.5-7b-hf" and "# no --base:" in text and "# assumed: " in text
    assert recipe.data.max_length >= 576, "an image has 576 tokens"
    assert recipe.model.gradient_checkpointing is True and recipe.train.accumulation_steps >= 1


def test_images_that_no_text_places_come_before_the_first_question() -> None:
    data = write_data(40)
    rows = json.loads(Path(data).read_text())
    for row in rows:
        row["conversations"][0]["value"] = row["conversations"][0]["value"].removeprefix("<image>\n")
    write_records(Path(data), rows)
    ended = init("--data", data)
    assert (ended.code, ended.err) == (0, "") and "no text has <image>: images come before" in ended.out
    recipe = load_recipe("mine.toml")
    assert recipe.data.missing_image_mark == "start" and recipe.data.images == "data/images"
    assert "40 images" in ended.out and start("check", "mine.toml").code == 0
    rows[0]["conversations"][0]["value"] = "<image>\nWhat is it?"  # those without a place may be mistakes now
    write_records(Path(data), rows)
    init("--data", data, "--force")
    assert "missing_image_mark" not in Path("mine.toml").read_text()


def test_columns_of_other_names_are_proposed_given_and_written() -> None:
    write_images("data/images", 30)
    rows = [{"photo": f"{n}.png", "q": f"What is {n}?", "label": "red"} for n in range(30)]
    data = str(write_records(Path("data/train.json"), rows))
    assert_refused(init("--data", data), ["Name the columns, --columns image=photo question=q answer=label, "])
    assert_refused(init("--data", data, "--columns", "question"), ["--columns question: it is not OURS=THEIRS"])
    assert_refused(
        init("--data", data, "--columns", "question=qq"), ["--columns question is 'qq'", "Did you mean 'q'?"]
    )
    recipe = made("--data", data, "--columns", "question=q", "answer=label", "image=photo")
    assert recipe.data.columns == {"question": "q", "answer": "label", "image": "photo"}
    assert recipe.data.images == "data/images" and start("check", "mine.toml").code == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--data", "data/train.json", "--images", "alone"], ["no image '0.png' in alone", "--images DIR"]),
        (["--data", "data/train.json", "--images", "nowhere"], ["--images: there is no folder nowhere"]),
        (["--data", "a.csv", "--images", "alone"], ["prepare csv --file a.csv --images alone --out data.jsonl"]),
        (["--data", "nowhere.json"], ["nowhere.json", "Check --data and --eval"]),
        (["--data", "alone"], ["alone", "holds no data file"]),
        (["--data", "data/train.json", "--eval", "none.json"], ["none.json", "Check --data and --eval"]),
        (["--data", "data/train.json", "--gpu", "0.5"], ["a GPU of 0.5 GB", "larger one with --gpu"]),
    ],
)
def test_broken_input_of_init(words: list[str], says: list[str]) -> None:
    write_data(30)
    Path("alone").mkdir()
    Path("a.csv").write_text("id\n1\n")
    assert_refused(init(*words), says)
    assert not Path("mine.toml").exists()


def test_broken_input_of_init_a_base() -> None:
    data = write_data(30)
    assert_refused(init("--data", data, base="./nowhere"), ["--base: there is no folder ./nowhere"])
    assert_refused(init("--data", data, base=str(PARITY / "clip")), ["clip"])


def test_the_remedy_for_images_works() -> None:
    write_images("far/away/pictures", 30)
    data = write_data(30, name="far.json")
    assert_refused(init("--data", data), ["--images DIR"])
    assert made("--data", data, "--images", "far/away/pictures").data.images == "far/away/pictures"


def test_a_file_that_is_there_is_kept() -> None:
    data = write_data(40, 4)
    Path("mine.toml").write_text("# mine")
    assert_refused(init("--data", data), ["mine.toml is there already", "--force"])
    assert Path("mine.toml").read_text() == "# mine"
    assert_refused(start("init", ".", "--data", data), [". is a folder"])
    assert_refused(start("init", "/proc/mine.toml", "--data", data), ["/proc/mine.toml cannot be written"])
    recipe = made("--data", data, "--force")
    assert recipe.run.name == "mine"
    assert not recipe.data.eval_fraction and recipe.eval.metric == "loss", "few images are not divided"


def test_names_are_written_so_that_toml_and_shell_read_them() -> None:
    data = write_data(30, name='my "data"\\ of/träin.json')
    ended = start("init", "a b/my récipe.toml", "--data", data, "--base", BASE)
    assert ended.code == 0, ended.err
    tables = tomllib.loads(Path("a b/my récipe.toml").read_text())
    assert tables["data"]["train"] == data and tables["run"]["name"] == "my-r-cipe"
    commands = [shlex.split(line) for line in ended.out.splitlines() if line.startswith("  llava-accel")]
    assert commands[0] == ["llava-accel", "check", "a b/my récipe.toml"]
    assert start(*commands[0][1:]).code == 0


def test_a_record_that_cannot_be_used_is_told() -> None:
    records = json.loads(Path(write_data(30)).read_text())
    write_records(Path("data/train.json"), [*records, {"id": "odd"}])
    ended = init("--data", "data/train.json")
    assert ended.code == 0 and "note: a record cannot be used, such as data/train.json, row 31 (id 'odd')" in ended.out


@pytest.mark.slow
def test_the_recipe_trains() -> None:
    made("--data", write_data(40))
    ended = start("train", "mine.toml", "train.max_steps=1", "checkpoint.verify=false", "data.workers=0")
    assert ended.code == 0, ended.err
    assert [line["step"] for line in metrics(Path("runs/mine")) if "loss" in line] == [1]
    assert "exact_match" in (Path("runs/mine") / "metrics.jsonl").read_text()


@pytest.mark.parametrize(("name", "template"), [("next-vicuna", "v1"), ("onevision-qwen", "qwen_1_5")])
def test_a_tiled_base_has_its_template_and_room_for_its_tiles(name: str, template: str) -> None:
    data = write_data(24)
    Image.new("RGB", (222, 222)).save("data/images/3.png")
    recipe = made("--data", data, base=str(KIT / name))
    assert recipe.model.template == template and recipe.data.image_placement == "auto"
    tiles = recipe.data.max_length
    checked = start("check", "mine.toml")
    assert checked.code == 0, checked.err
    refused = start("check", "mine.toml", "data.max_length=80")
    (needed,) = re.findall(r"data\.max_length = (\d+) takes all of them", refused.out)
    assert (
        refused.code == 1
        and 80 < int(needed) <= tiles
        and "of them of images, exceed data.max_length = 80" in refused.out
    )
