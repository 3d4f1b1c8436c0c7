"""The figures of a GPU, on LLaVA-1.5-7B's shapes with random weights: LoRA of rank 128, bf16, about 640 tokens a question.

    python tests/gpu/figures.py [--only NAME ...] [--minutes 9] [--rounds 3] [--folder FOLDER] [--rehearse]

Each figure has a process of its own, and its rows are printed as they come: a JSON line each, and a table at the end. Both
go to $OUT too where that is set. A figure that fails, or for which no time is left, is a row that says "not measured".
Needs 80 GB of GPU memory and 14 GB of disk for the base, which stays in the folder. `--rehearse` takes a model of two
layers in fp32 instead: it shows on any machine that each figure can be measured, and what it prints says nothing.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from rich.console import Console
from rich.table import Table

from gpu.measures import FIGURES, Measured, Setting

NAMES = tuple(FIGURES)


@dataclass(frozen=True, slots=True)
class Row(Measured):
    """A value of a figure, or why there is none."""

    figure: str = field(kw_only=True)

    @property
    def reached(self) -> str:
        if self.value is None or self.target is None:
            return ""
        return "yes" if (self.value <= self.target if self.is_limit else self.value >= self.target) else "no"

    @property
    def cells(self) -> list[str]:
        value = f"{self.value:,.4g} {self.unit}" if self.value is not None else f"not measured: {self.note}"
        target = "" if self.target is None else f"at {'most' if self.is_limit else 'least'} {self.target:g} {self.unit}"
        return [self.title, value, target, self.reached]


def run_one(name: str, setting: Setting) -> None:
    """Measure one figure in this process, a JSON line for each of its rows."""
    for found in FIGURES[name].measure(setting):
        print(json.dumps({"row": asdict(Row(**asdict(found), figure=name))}), flush=True)


def rows_of(name: str, words: Sequence[str], seconds: float) -> Iterator[Row]:
    """The rows of a figure, as its own process prints them; one without a value where it ends before its time."""
    figure = FIGURES[name]
    if seconds <= 0:
        yield Row(figure.title, figure=name, note="no time is left: name it with --only")
        return
    command = [sys.executable, __file__, "--one", name, *words]
    late = threading.Event()
    with tempfile.TemporaryFile("w+") as errors, subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
    ) as process:  # fmt: skip
        timer = threading.Timer(seconds, lambda: (late.set(), os.killpg(process.pid, signal.SIGKILL)))
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith('{"row"'):
                yield Row(**json.loads(line)["row"])
        process.wait()
        timer.cancel()
        errors.seek(0)
        said = errors.read().strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
    if late.is_set():
        yield Row(figure.title, figure=name, note=f"stopped after {seconds:.0f} s: name it with --only")
    elif process.returncode:
        yield Row(figure.title, figure=name, note=said[0][:200])


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Measure, and print the rows as they come and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--minutes", type=float, default=9.0, help="no figure starts, and none goes on, after these")
    parser.add_argument("--folder", type=Path, help="where the base goes, and is looked for")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rehearse", action="store_true", help="small shapes in fp32, on any machine")
    parser.add_argument("--one", choices=NAMES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.rehearse and not torch.cuda.is_available():
        raise SystemExit("no GPU here: --rehearse shows that the script works")
    if options.one:
        run_one(options.one, Setting(options.folder, options.rehearse, options.rounds))
        return []
    end = time.monotonic() + 60 * options.minutes
    out = Path(os.environ["OUT"]) if os.environ.get("OUT") else None
    rows = list[Row]()
    with tempfile.TemporaryDirectory() as place:
        words = ["--folder", str(options.folder or place), "--rounds", str(options.rounds)]
        words += ["--rehearse"] if options.rehearse else []
        for name in options.only:
            for row in rows_of(name, words, end - time.monotonic()):
                rows.append(row)
                print(json.dumps(asdict(row)), flush=True)
                if out:
                    with (out / "figures.jsonl").open("a") as file:
                        print(json.dumps(asdict(row)), file=file)
    _show(rows, options.rehearse, out)
    return rows


def _show(rows: Sequence[Row], rehearses: bool, out: Path | None) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    table = Table(title=f"{device}, torch {torch.__version__}{', rehearsed: of no meaning' if rehearses else ''}")
    for column in ("figure", "measured", "target", "reached"):
        table.add_column(column)
    for row in rows:
        table.add_row(*row.cells)
    Console(width=150).print(table)
    if out:
        with (out / "figures.txt").open("w") as file:
            Console(width=150, file=file).print(table)


if __name__ == "__main__":
    main()
