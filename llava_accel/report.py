"""Write the report of a run, or compare several, as one HTML file that needs no network."""

from llava_accel.console.command_line import start

if __name__ == "__main__":
    start("report")  # before the imports below, so that help and mistakes are answered at once


import argparse
from pathlib import Path

from llava_accel.exceptions import UserError
from llava_accel.pages.write import write_comparison, write_report


def main(arguments: argparse.Namespace) -> None:
    """`llava-accel report RUN ...`."""
    runs: list[Path] = arguments.runs
    try:
        if len(runs) == 1:
            print(f"report: {write_report(runs[0])}")
        else:
            print(f"comparison: {write_comparison(runs, arguments.out or runs[0].parent / 'comparison.html')}")
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}. Check the folder and its permissions") from None
