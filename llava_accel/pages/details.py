"""The tables of a page: every evaluation, scores by type, the recipe, what it ran on, and how to repeat it."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llava_accel.pages.history import History, Prediction
from llava_accel.pages.html import PERCENT
from llava_accel.recipe import changed_keys
from llava_accel.recipe.names import DEFAULTS
from llava_accel.recipe.toml import flatten, toml_value
from llava_accel.scoring.metrics import TypeScore, by_type, score_names, score_title

_HIDDEN = {"blind_num_answers"}
_BESIDE = ("common_", "low_", "high_")  # shown in tiles, or beside the score
_ONE_PROCESS = "NO"  # what Accelerate calls it
_ENVIRONMENT = {
    "device": "device", "cpu_count": "CPU cores", "num_processes": "processes", "backend": "backend",
    "mixed_precision": "mixed precision", "platform": "platform", "python": "python", "git_commit": "commit",
}  # fmt: skip


def evaluation_columns(lines: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Key -> title of everything that evaluations measured, the well-known first. What never changes is in a tile."""
    keys = {key for line in lines for key in line["eval"] if not key.startswith(_BESIDE)} - _HIDDEN
    scores = [key for score in score_names(keys) for key in (score, f"blind_{score}")]
    first = [key for key in ("loss", *scores, "num_answers") if key in keys]
    ordered = first + sorted(keys - set(first))
    return {key: _column_title(key) for key in ordered}


def _column_title(key: str) -> str:
    if key.startswith("num_"):
        return key.removeprefix("num_").replace("_", " ")
    return f"blind {score_title(key.removeprefix('blind_'))}" if key.startswith("blind_") else score_title(key)


def type_tables(
    predictions: Sequence[Prediction], before: Sequence[Prediction], metric: str
) -> dict[str, list[tuple[str, TypeScore, float | None]]]:
    """(type, score, score of the base) by answer type and by question type, where the annotations have types."""
    scored, base = (by_type({**row, "score": row[metric]} for row in rows) for rows in (predictions, before))
    return {
        kind: [
            (name, score, base[kind][name].mean if name in base.get(kind, {}) else None)
            for name, score in scored[kind].items()
        ]
        for kind in ("answer_type", "question_type")
        if kind in scored
    }


_DATA = {
    "records": "records", "left_out": "left out", "images": "images", "without_image": "records without an image",
    "turns": "turns of a record", "tokens": "tokens of a record, those of images included",
    "targets": "tokens of a record that are learned",
}  # fmt: skip


def data_rows(run: History) -> list[tuple[str, list[str]]]:
    """(what, values) of the training data and, where there are some, of the held-out data."""
    parts = [part for part in (run.figures.get("train"), run.figures.get("eval")) if part]
    return [(title, [_figure(part[key]) for part in parts]) for key, title in _DATA.items()] if parts else []


def _figure(value: Any) -> str:
    """A count, or a spread as people read it."""
    if not isinstance(value, Mapping):
        return f"{value:,}"
    return (
        f"{value['mean']:,.1f} on average, up to {value['p95']:,.0f} in 95{PERCENT} of them, {value['max']:,} at most"
    )


def source_rows(run: History) -> list[tuple[str, int, float, float | None]]:
    """(source, records, share of an epoch, share of what was trained on so far), where there are several sources."""
    sources, trained = run.figures.get("sources", []), run.trained_examples
    total = sum(trained.values())
    return [
        (each["name"], each["records"], each["share"], trained.get(each["name"], 0) / total if total else None)
        for each in sources
        if len(sources) > 1
    ]


def common_answers(run: History) -> list[tuple[str, int, float]]:
    """(answer, records, share) of the answers that most training records end in."""
    known = (run.figures.get("train") or {}).get("common_answers", [])
    return [(each["answer"], each["records"], each["share"]) for each in known]


def recipe_rows(run: History) -> list[tuple[str, str, str]]:
    """(key, value, default) of the keys that differ from the defaults, or have none."""
    defaults = DEFAULTS | {"run.output_dir": f"runs/{run.name}"}
    return [
        (key, toml_value(value), toml_value(defaults[key]) if key in defaults else "no default")
        for key, value in changed_keys(run.recipe).items()
    ]


def differing_keys(runs: Sequence[History]) -> list[tuple[str, list[str]]]:
    """Keys of the recipes that are not the same in all runs, each with its value in every run."""
    known = [{key: toml_value(value) for key, value in flatten(run.recipe.model_dump()).items()} for run in runs]
    return [row for row in _differing(known, "not set") if row[0] not in ("run.name", "run.output_dir")]


def differing_environment(runs: Sequence[History]) -> list[tuple[str, list[str]]]:
    """Hardware and versions that are not the same in all runs, each with its value in every run."""
    return _differing([dict(environment_rows(run)) for run in runs], "not installed or unknown")


def _differing(known: Sequence[Mapping[str, str]], missing: str) -> list[tuple[str, list[str]]]:
    names = dict.fromkeys(name for run in known for name in run)
    rows = [(name, [run.get(name, missing) for run in known]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def environment_rows(run: History) -> list[tuple[str, str]]:
    """Hardware and versions."""
    known: dict[str, Any] = run.environment
    if known.get("backend") == _ONE_PROCESS:
        known = known | {"backend": "one process"}
    rows = [(title, str(known[key])) for key, title in _ENVIRONMENT.items() if known.get(key) is not None]
    return rows + [(name, str(version)) for name, version in known.get("packages", {}).items()]


def doubts_command(run: History) -> str:
    """The command that lists the records to look at."""
    return shlex.join(["llava-accel", "check", str(run.folder / "recipe.toml"), "--against", str(run.folder)])


def commands(run: History) -> list[tuple[str, str]]:
    """Commands that go on from here: (what it does, the command)."""
    folder, recipe = shlex.quote(str(run.folder)), shlex.quote(str(run.folder / "recipe.toml"))
    again = shlex.quote(f"run.output_dir={run.folder}-again")
    ranks = run.environment.get("num_processes", 1)
    processes = "" if ranks == 1 else f" --num-processes {ranks}"
    if run.environment.get("backend") in ("DEEPSPEED", "FSDP"):
        processes += " --profile PROFILE.yaml"
    shown = [("Repeat this run", f"llava-accel train {recipe} {again}{processes}")]
    if command := run.environment.get("command"):
        shown.append(("It was started with", str(command)))
    if not run.is_over:
        shown.append(("Continue it, if it was interrupted", f"llava-accel train {recipe}{processes}"))
    if run.chosen and run.recipe.model.train != "projector":
        shown.append(("Talk to it", f"llava-accel chat --adapter {folder}"))
    return shown
