"""Write the report of a run, or compare several, as one HTML file that needs no network."""

from llava_accel.console.command_line import start

if __name__ == "__main__":
    start("report")  # before the imports below, so that help and mistakes are answered at once


import argparse
from pathlib import Path

from llava_accel.pages.write import write_comparison, write_report
from llava_accel.storage.atomic import check_out


def main(arguments: argparse.Namespace) -> None:
    """`llava-accel report RUN ...`."""
    runs: list[Path] = arguments.runs
    if len(runs) == 1:
        print(f"report: {write_report(runs[0])}")
        return
    out = arguments.out or runs[0].parent / "comparison.html"
    check_out(out, "--out", "comparison.html")
    print(f"comparison: {write_comparison(runs, out)}")
