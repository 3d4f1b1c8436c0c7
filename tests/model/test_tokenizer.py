"""Which file a base's tokenizer comes from, and which of its tokens a text may become."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from helpers.broken_models import edit
from helpers.tiny import task_base
from helpers.vocabularies import base_of, own_ids
from llava_accel.data.text_encoder import TextEncoder
from llava_accel.exceptions import UserError
from llava_accel.model.bases import Base, Layout, find_base
from llava_accel.model.processing import load_processing
from llava_accel.model.saved_processor import save_processor, save_tokenizer
from llava_accel.model.tokenizer import allow_tokens, load_tokenizer, refuse_tokens_without_rows
from llava_accel.recipe import ModelTable

SPACES = "a  the"


def two_files(folder: Path, layout: Layout, *, agree: bool) -> list[str]:
    """The notes on a folder with tokenizer.model and a tokenizer.json that `agree`s with it, or is transformers 5's own;
    what is used is asserted."""
    base = base_of("llama", folder, layout)
    loaded = load_tokenizer(base)[0] if agree else AutoTokenizer.from_pretrained(folder)
    loaded.save_pretrained(folder / "json")
    shutil.copyfile(folder / "json" / "tokenizer.json", folder / "tokenizer.json")
    tokenizer, notes = load_tokenizer(base)
    is_own = TextEncoder(tokenizer)(SPACES, "start") == own_ids("llama").encode(SPACES)
    assert is_own == (agree or layout == "original")
    return notes


@pytest.mark.parametrize(("layout", "used"), [("original", "model"), ("hub", "json"), ("parts", "json")])
def test_files_that_disagree_are_named_with_the_one_that_is_used(tmp_path: Path, layout: Layout, used: str) -> None:
    (note,) = two_files(tmp_path, layout, agree=False)
    assert f"tokenizer.{used} is used" in note and f"move tokenizer.{used} out of the folder" in note
    base = base_of("llama", tmp_path, layout)
    (tmp_path / f"tokenizer.{used}").rename(tmp_path / "moved")
    tokenizer, notes = load_tokenizer(base)
    is_own = TextEncoder(tokenizer)(SPACES, "start") == own_ids("llama").encode(SPACES)
    assert notes == [] and is_own == (used == "json")


@pytest.mark.parametrize("layout", ["original", "hub", "parts"])
def test_files_that_agree_are_not_worth_a_word(tmp_path: Path, layout: Layout) -> None:
    assert two_files(tmp_path, layout, agree=True) == []


def test_a_tokenizer_model_of_another_library_is_left_to_transformers(tmp_path: Path) -> None:
    base = base_of("llama", tmp_path)
    load_tokenizer(base)[0].save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # as Llama 3's
    tokenizer, notes = load_tokenizer(base)
    assert notes == [] and TextEncoder(tokenizer)(SPACES, "start") == own_ids("llama").encode(SPACES)


def test_a_word_without_a_row_is_refused_and_a_special_token_is_not(tmp_path: Path) -> None:
    base = base_of("llama", tmp_path)
    tokenizer, _ = load_tokenizer(base)
    rows = len(own_ids("llama"))
    refuse_tokens_without_rows(tokenizer, base, rows)  # <image> is special, and is no text
    tokenizer.add_tokens(["<new>"])
    number = tokenizer.get_vocab()["<new>"]
    with pytest.raises(UserError, match=rf"'<new>'.*token {number} of.*resize_token_embeddings\({number + 1}\)"):
        refuse_tokens_without_rows(tokenizer, base, rows)
    refuse_tokens_without_rows(tokenizer, base, number + 1)


def test_a_tokenizer_with_a_larger_vocabulary_than_the_embedding_is_refused(tmp_path: Path) -> None:
    base = base_of("llama", tmp_path)
    with pytest.raises(UserError, match="tokens without a row"):
        refuse_tokens_without_rows(load_tokenizer(base)[0], base, 1000)


def test_task_tokens_are_read_where_the_recipe_allows_them(tmp_path: Path, llava_folder: Path) -> None:
    base = str(task_base(tmp_path / "base", llava_folder))
    text = "<box>red<loc_2>"
    spelled = load_processing(ModelTable(base=base), "pad")
    assert not {100, 102} & set(TextEncoder(spelled.processor.tokenizer, words=spelled.words)(text, "text"))
    allowed = load_processing(ModelTable(base=base, added_tokens=("<box>", "<loc_*>")), "pad")
    assert allowed.words == ("<box>", "<loc_1>", "<loc_2>")
    ids = TextEncoder(allowed.processor.tokenizer, words=allowed.words)(text, "text")
    assert ids[0] == 100 and ids[-1] == 102
    assert allowed.processor.tokenizer.decode(ids, skip_special_tokens=True) == text, "answers show them"
    save_processor(tmp_path / "saved", allowed)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("pattern", "says"),
    [("<bax>", r"no added token '<bax>'.*Choose of: .*<box>"), ("*", "names .*</s>"), ("<image>", "structures")],
)
def test_a_pattern_that_names_nothing_or_structure_is_refused(
    tmp_path: Path, llava_folder: Path, pattern: str, says: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(task_base(tmp_path / "base", llava_folder))
    with pytest.raises(UserError, match=says):
        allow_tokens(tokenizer, [pattern], "<image>")


def changed(folder: Path, base: Path, tokenizer_class: str, **parts: object) -> Base:
    """A copy of a base with another tokenizer_class, and other parts in its tokenizer.json."""
    edit("tokenizer_config.json", tokenizer_class=tokenizer_class)(Path(shutil.copytree(base, folder)))
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["model"] |= parts.pop("model", {})
    (folder / "tokenizer.json").write_text(json.dumps(spec | parts))
    return find_base(ModelTable(base=str(folder)))


DIGITS = {"pre_tokenizer": {"type": "Digits", "individual_digits": True}, "normalizer": {"type": "Lowercase"}}


@pytest.mark.parametrize("name", ["LlamaTokenizer", "Qwen2Tokenizer", "GPT2Tokenizer", "PreTrainedTokenizerFast"])
def test_a_tokenizer_json_is_read_as_it_is_whatever_its_class(tmp_path: Path, llava_folder: Path, name: str) -> None:
    tokenizer, notes = load_tokenizer(changed(tmp_path / "base", llava_folder, name, **DIGITS))
    file = TextEncoder(PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "base" / "tokenizer.json")))
    texts = ("What  is 42?", "red", "A\nb", "</s>")
    assert [TextEncoder(tokenizer)(text, "start") for text in texts] == [file(text, "start") for text in texts]
    said = [note for note in notes if f"builds a {name} that differs" in note]
    assert len(said) == (name != "PreTrainedTokenizerFast")
    save_tokenizer(tmp_path / "saved", tokenizer)
    saved = TextEncoder(AutoTokenizer.from_pretrained(tmp_path / "saved"))
    assert [saved(text, "start") for text in texts] == [file(text, "start") for text in texts]


def test_the_spaces_that_a_config_asks_for_count_more_than_those_of_tokenizer_json(
    tmp_path: Path, llava_folder: Path
) -> None:
    base = changed(tmp_path / "base", llava_folder, "LlamaTokenizer")
    edit("tokenizer_config.json", add_prefix_space=False)(base.folder)
    tokenizer, notes = load_tokenizer(base)
    assert not TextEncoder(tokenizer).space_at_start and not [note for note in notes if "builds" in note]


def test_merges_that_are_left_out_at_random_are_made(tmp_path: Path, llava_folder: Path) -> None:
    settings = {"dropout": 0.9}
    tokenizer, notes = load_tokenizer(
        changed(tmp_path / "base", llava_folder, "PreTrainedTokenizerFast", model=settings)
    )
    usual, _ = load_tokenizer(changed(tmp_path / "usual", llava_folder, "PreTrainedTokenizerFast"))
    assert "skips merges at random" in notes[0]
    text = "What is in the image?"
    assert tokenizer.encode(text) == usual.encode(text) and TextEncoder(tokenizer)(text, "start") == TextEncoder(usual)(
        text, "start"
    )


def test_a_class_that_cannot_hold_the_vocabulary_is_refused_with_one_that_can(
    tmp_path: Path, llava_folder: Path
) -> None:
    base = changed(tmp_path / "base", llava_folder, "T5Tokenizer")
    with pytest.raises(UserError, match='write "PreTrainedTokenizerFast"'):
        load_tokenizer(base)
    edit("tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")(base.folder)
    assert TextEncoder(load_tokenizer(base)[0])("red", "start")
