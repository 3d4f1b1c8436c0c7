"""Write the report of a run, or compare several, as one HTML file that needs no network."""

import argparse
from pathlib import Path

from llava_accel.console.command_line import run
from llava_accel.exceptions import UserError
from llava_accel.pages.write import write_comparison, write_report

_EXAMPLE = """examples:
  python -m llava_accel.report runs/quickstart
  python -m llava_accel.report runs/rank_16 runs/rank_128 --out comparison.html"""


def main() -> None:
    """Entry point of `python -m llava_accel.report`."""
    parser = argparse.ArgumentParser(
        prog="python -m llava_accel.report",
        description=__doc__,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run folder; several are compared")
    parser.add_argument(
        "--out", metavar="FILE.html", type=Path, help="of a comparison; by default comparison.html beside the first run"
    )
    arguments = parser.parse_args()
    if arguments.out and len(arguments.runs) == 1:
        parser.error("--out is for a comparison: the report of one run is RUN/report.html")
    run(lambda: _report(arguments.runs, arguments.out))


def _report(runs: list[Path], out: Path | None) -> None:
    try:
        if len(runs) == 1:
            print(f"report: {write_report(runs[0])}")
        else:
            print(f"comparison: {write_comparison(runs, out or runs[0].parent / 'comparison.html')}")
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}. Check the folder and its permissions") from None


if __name__ == "__main__":
    main()
