"""`llava-accel VERB ...` is `python -m llava_accel.VERB ...`."""

import difflib
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
        if sys.argv[1:] in ([], ["-h"], ["--help"]):
            sys.exit(0)
        near = difflib.get_close_matches(verb, SUMMARIES, n=1)
        print(f"error: there is no verb {verb!r}{f'. Did you mean {near[0]}?' if near else ''}", file=sys.stderr)
        sys.exit(2)
    del sys.argv[1]
    prepare() if verb == "prepare" else start(verb)


SUMMARIES = {verb: known.summary.splitlines()[0] for verb, known in VERBS.items()} | {
    "prepare": "Turn public data sets and tables into the JSON lines that data.train reads."
}

if __name__ == "__main__":
    main()
