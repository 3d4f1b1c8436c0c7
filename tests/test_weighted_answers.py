"""Several annotators' answers to one question are learned by their shares, and one run of the prompt serves them all."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llava_accel.train as verb
from helpers.runs import distance, metrics, recipe, talk, trained, write_records
from llava_accel.data.corpus import Corpus
from llava_accel.data.trie import share_rows
from llava_accel.model.processing import load_processing
from llava_accel.recipe import Recipe
from llava_accel.setup.datasets import open_corpora

TOLERANCE = 1e-5
ANSWERS = {"a red square": 5, "a red circle": 3, "blue": 1, "two small blue squares on the left": 1}


def _records() -> list[dict[str, object]]:
    """Questions on one image, on two and on none, most with several answers; one after an earlier round."""
    asked = [("What is it?", ("t0.png",)), ("Is it red?", ("t0.png",)), ("What is it?", ("t1.png", "t0.png"))]
    asked += [("Say something.", ()), ("What is it?", ())]
    found = [talk(n, question, "blue", *images) for n, (question, images) in enumerate(asked)]
    for record in found[:-1]:
        record["answers"] = ANSWERS
    earlier: Any = found[1]["conversations"]
    earlier += [{"from": "human", "value": "And what else?"}, {"from": "gpt", "value": "yes"}]
    return found


def _recipe(folder: Path, **data: object) -> Recipe:
    template = str(data.pop("template", "v1"))
    records = write_records(folder / "data.json", _records())
    return recipe(
        folder / "-".join(map(str, data.values())),
        records,
        model={"template": template},
        data={"answers": "weighted", **data},
        # Of SGD, whose update is the gradient: Adam's first one makes as much of rounding noise as of a gradient.
        optim={"optimizer": "sgd", "schedule": "constant", "warmup_fraction": 0.0, "max_grad_norm": 0.0}
        | {"learning_rate": 1.0, "projector_learning_rate": 1.0},
        train={"per_device_batch_size": 5, "max_steps": 2},
    )


def _corpus(folder: Path, **data: object) -> Corpus:
    run = _recipe(folder, **data)
    return open_corpora(run, load_processing(run.model, run.data.image_aspect))[0]


@pytest.mark.parametrize("template", ["v1", "llava_llama_2", "mistral_instruct"])
def test_sharing_the_question_changes_no_update(tmp_path: Path, template: str) -> None:
    runs: dict[bool, Path] = {}
    for share in (False, True):
        run = _recipe(tmp_path, share_prefix=share, template=template)
        verb.train(run)
        runs[share] = Path(run.run.output_dir)
    for one, other in zip(metrics(runs[False]), metrics(runs[True]), strict=True):
        for key in ("loss", "grad_norm"):
            assert other[key] == pytest.approx(one[key], rel=TOLERANCE)
        assert other["num_tokens"] == one["num_tokens"] and other["num_examples"] == one["num_examples"] == 5
    assert distance(trained(runs[True] / "export"), trained(runs[False] / "export")) < TOLERANCE


def test_an_answer_weighs_what_its_annotators_are_of_all(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path)
    answers = corpus.encode(0).examples
    assert [example.weight for example in answers] == pytest.approx([0.5, 0.3, 0.1, 0.1])
    last = corpus.encode(4).examples
    assert len(last) == 1 and last[0].weight == 1.0, "a record without answers is learned as it is"
    texts = [_tokenizer(tmp_path).decode(example.input_ids[example.is_target][:-1]) for example in answers]
    assert [text.strip() for text in texts] == list(ANSWERS)


def test_the_loss_is_the_weighted_mean_over_the_answers(tmp_path: Path) -> None:
    """One question alone: (sum of shares x losses) / (sum of shares x targets) of runs on each answer."""
    question = _records()[0]
    sums = np.zeros(2)
    for number, (text, count) in enumerate(ANSWERS.items()):
        line = _first_loss(tmp_path / str(number), talk("q", "What is it?", text, "t0.png"), "most_frequent")
        sums += count / 10 * line["num_targets"] * np.array([line["loss"], 1.0])
    line = _first_loss(tmp_path / "all", question, "weighted")
    assert line["loss"] == pytest.approx(sums[0] / sums[1], rel=TOLERANCE)


def _first_loss(folder: Path, record: dict[str, object], answers: str) -> dict[str, float]:
    folder.mkdir()
    records = write_records(folder / "data.json", [record])
    run = recipe(folder, records, data={"answers": answers}, train={"max_steps": 1})
    verb.train(run)
    return metrics(Path(run.run.output_dir))[0]


def _tokenizer(folder: Path) -> Any:
    run = _recipe(folder)
    return load_processing(run.model, run.data.image_aspect).processor.tokenizer


def test_answers_stand_behind_one_question_and_rows_are_split_between_them(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path)
    for row in range(4):
        answers = corpus.encode(row).examples
        (whole,) = share_rows(answers, 10_000)
        assert len(whole) == whole.num_example_tokens < sum(len(example.input_ids) for example in answers) / 2
        assert whole.indices == (row,) and sum(whole.target_weights) == pytest.approx(_targets(answers))
        longest = max(len(example.input_ids) for example in answers)
        parts = share_rows(answers, longest)
        assert len(parts) > 1 and all(len(part) <= longest for part in parts)
        assert sorted(index for part in parts for index in part.indices) == [row]
        assert sum(float(part.target_weights.sum()) for part in parts) == pytest.approx(_targets(answers))


def _targets(answers: Any) -> float:
    return sum(example.weight * example.num_targets for example in answers)


def test_a_round_that_is_dropped_takes_its_answers_along(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path, max_length=92, on_too_long="drop_turns")
    whole, shortened = corpus.encode(0), corpus.encode(1)
    assert len(whole.examples) == 4 and whole.dropped_turns == 0
    assert len(shortened.examples) == 1 and shortened.dropped_turns == 2
