"""`llava-accel VERB ...` is `python -m llava_accel.VERB ...`."""

import sys

from llava_accel.console.command_line import start
from llava_accel.console.verbs import VERBS
from llava_accel.prepare import main as prepare


def main() -> None:
    """Run the verb that the command line names."""
    verb = sys.argv[1] if len(sys.argv) > 1 else ""
    if verb not in SUMMARIES:
        print("usage: llava-accel VERB ...   (VERB --help shows an example)\n")
        for name, summary in sorted(SUMMARIES.items()):
            print(f"  {name:10} {summary}")
        sys.exit(0 if sys.argv[1:] in ([], ["-h"], ["--help"]) else 2)
    del sys.argv[1]
    prepare() if verb == "prepare" else start(verb)


SUMMARIES = {verb: known.summary.splitlines()[0] for verb, known in VERBS.items()} | {
    "prepare": "Turns public data sets and tables into the JSON lines that data.train reads."
}

if __name__ == "__main__":
    main()
