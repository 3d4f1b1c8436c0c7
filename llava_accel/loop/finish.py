"""The end of a run: a last checkpoint, the export, the outcome, and what to do next."""

import shlex
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from llava_accel.checkpoint.store import Checkpoints
from llava_accel.console.output import Console
from llava_accel.data.spread import spread
from llava_accel.estimate.answers import questions_at_once
from llava_accel.exceptions import Interrupted, UserError
from llava_accel.loop.meter import Meter
from llava_accel.release.verification import reference_outputs, standing_by, verify
from llava_accel.runtime.context import Prepared, RunContext
from llava_accel.runtime.engines import release
from llava_accel.runtime.signals import Interruption
from llava_accel.runtime.timing import waiting_note
from llava_accel.scoring.best import read_lines
from llava_accel.scoring.harmful import counts_of, write_harmful
from llava_accel.scoring.held_out import AtOnce, score_training
from llava_accel.scoring.metrics import cell, main_score, score_names, score_title
from llava_accel.setup.datasets import Part
from llava_accel.setup.run_folder import write_end
from llava_accel.setup.state import TrainState
from llava_accel.storage.jsonl import read_json_lines

_SHOWN_ANSWERS = 6
_SHOWN_EVALUATIONS = 5
_MOST_COLUMNS = 6  # of a table of scores; more of them have a row each
_SHOWN_SHARE = 0.0005


def finish(
    run: RunContext,
    prepared: Prepared,
    parts: tuple[Part, Part | None],
    checkpoints: Checkpoints,
    state: TrainState,
    meter: Meter,
    interruption: Interruption,
) -> None:
    """Save, export, close the meter and the trackers, and print the outcome. Every rank must call it.

    It exports, verifies and shows the best checkpoint, if the run keeps one.

    Args:
        prepared: Model and optimizer; both are empty afterwards.
        parts: Training data, of which the report shows the hardest examples, and held-out data.

    Raises:
        Interrupted: the run was asked to end, and has saved.
        UserError: it could not be saved, or its export does not compute what was trained when it is loaded elsewhere.
    """
    # Imported here: plotting takes a second to import, and the first step is not to wait for it.
    from llava_accel.pages.write import attempted, report_end

    recipe, accelerator, console = run.recipe, run.accelerator, run.console
    folder, objective = Path(recipe.run.output_dir), prepared.objective
    received = interruption.agreed(accelerator)
    # Before the first step there is nothing to save: the next start evaluates the base again.
    if (state.step or not received) and not (checkpoints.save(meter.enter) and checkpoints.settled()):
        raise UserError(f"run.output_dir: {folder} has no checkpoint of step {state.step}, for the reason above")
    meter.enter("saving")
    if received:
        objective.flush_features()
        meter.close()
        accelerator.end_training()
        if accelerator.is_main_process:
            write_end(folder, "signal", received.name)
            report_end(recipe, state, console)
        console.line(
            f"{received.name}: ended at step {state.step} of {state.num_steps}; the same command goes on from here"
        )
        raise Interrupted(received)
    with standing_by(run) as process:
        step = checkpoints.take_best()
        checkpoints.export(folder / "export", step)
        training, held_out = parts
        if recipe.eval.train_limit:
            meter.enter("evaluation")
            with left_out_without_memory("eval.train_limit", console):
                at_once = AtOnce(questions_at_once(run, checkpoints.processing, training))
                score_training(run, prepared.model, training, checkpoints.processing.processor.tokenizer, at_once)
        reference = None
        if recipe.checkpoint.verify:
            with left_out_without_memory("checkpoint.verify", console):
                reference = reference_outputs(recipe, objective, held_out or training, accelerator)
        objective.flush_features()
        meter.close()
        accelerator.end_training()
        if not accelerator.is_main_process:
            return
        show_times(meter.seconds, console)
        show_evaluations(folder, state, console)
        show_answers(folder / "predictions" / f"step-{step:06d}.jsonl", step, console)
        lines, problem = attempted(lambda: write_harmful(folder, step, training, held_out, console))
        if problem:
            console.line(f"records to look at: not listed ({problem}). The run is complete")
        elif lines:
            check = shlex.join(["llava-accel", "check", str(folder / "recipe.toml"), "--against", str(folder)])
            console.line(f"records to look at: {counts_of(lines)}; `{check}` lists them")
        write_end(folder, "finished" if state.step >= state.num_steps else "patience")
        report_end(recipe, state, console)
        release(prepared, objective.parked.module if objective.parked else None)
        if reference:
            verify(reference, folder / "export", run, interruption, process)
        which = f"step {step:,}" + (
            f", the best by eval.metric = {recipe.eval.metric}" if step == state.best_step else ""
        )
        console.line(f"{'adapter' if recipe.model.train == 'lora' else 'weights'}: {folder / 'export'} ({which})")
        if recipe.model.train != "projector":
            console.line(f"next: {shlex.join(['llava-accel', 'chat', '--adapter', str(folder)])}")


@contextmanager
def left_out_without_memory(key: str, console: Console) -> Iterator[None]:
    """Around work that a saved run can do without: if memory runs out, it is left out, and a line says so."""
    try:
        yield
    except torch.OutOfMemoryError:
        console.line(f"{key}: left out, as it ran out of memory. The run is complete")


def show_times(seconds: Mapping[str, float], console: Console) -> None:
    """Print where the time of this process went, from its first step to its last save."""
    total = sum(seconds.values())
    shown = [phase for phase in seconds if seconds[phase] >= _SHOWN_SHARE * total]
    rows = [[phase.replace("_", " "), f"{seconds[phase]:,.1f}", f"{seconds[phase] / total:.1%}"] for phase in shown]
    console.table("where the time went", ["", "seconds", "share"], [*rows, ["all", f"{total:,.1f}", ""]])
    if note := waiting_note(seconds):
        console.line(note)


def show_evaluations(folder: Path, state: TrainState, console: Console) -> None:
    """Print the scores before training, the last ones and the best, from metrics.jsonl."""
    lines = read_lines(folder / "metrics.jsonl")
    evaluations = [line for line in lines if "eval" in line]
    if not evaluations:
        return
    shown = [line for line in evaluations[-_SHOWN_EVALUATIONS:] if line is not evaluations[0]]
    shown += [line for line in evaluations if line["step"] == state.best_step and line not in (*shown, evaluations[0])]
    rows, columns = [], _columns({key for line in evaluations for key in line["eval"]})
    common = [cell(evaluations[-1]["eval"], f"common_{key}") for key in columns]
    if any(common):
        rows.append(["commonest answer", *common])
    for line in [evaluations[0], *sorted(shown, key=lambda line: line["step"])]:
        name = "before training" if line["step"] == 0 else f"step {line['step']:,}"
        name += " (best)" if line["step"] == state.best_step and state.best is not None else ""
        # The interval of the blind score is in the report: with it, cells of a table with two scores would wrap.
        rows.append([name, *(cell(line["eval"], key, is_short=key.startswith("blind_")) for key in columns)])
    if len(columns) <= _MOST_COLUMNS:
        return console.table("evaluations", ["", *columns.values()], rows, is_narrow=True)
    named = zip(columns.values(), zip(*(values for _, *values in rows), strict=True), strict=True)
    turned = [[title, *values] for title, values in named]
    console.table("evaluations", ["", *(name for name, *_ in rows)], turned, is_narrow=True)


def _columns(measured: Collection[str]) -> dict[str, str]:
    """Key -> title of the columns that fit a narrow table: the scores, the main one also with blanked images."""
    main = main_score("loss", measured)
    columns = {"loss": "loss"}
    for name in score_names(measured):
        columns |= {name: score_title(name)}
        columns |= {f"blind_{name}": "blind"} if name == main else {}
    return {key: title for key, title in (columns | {"num_answers": "answers"}).items() if key in measured}


def show_answers(path: Path, step: int, console: Console) -> None:
    """Print a few answers of that step, spread over the evaluation data."""
    if not path.exists():
        return
    predictions = read_json_lines(path)
    shown = [predictions[place] for place in spread(len(predictions), _SHOWN_ANSWERS)]
    rows = [
        [row["question"], max(row["answers"], key=row["answers"].get), row["prediction"], f"{row['score']:.2f}"]
        for row in shown
    ]
    columns = ["question", "reference", "prediction", "score"]
    console.table(f"some answers of step {step:,}", columns, rows, is_narrow=True)
