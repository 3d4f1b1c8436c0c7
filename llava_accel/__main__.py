"""`llava-accel VERB ...` is `python -m llava_accel.VERB ...`."""

import runpy
import sys
from pathlib import Path

_NOT_VERBS = {"__init__", "__main__"}


def verbs() -> dict[str, str]:
    """Every verb and the first line of what its file says of it."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem not in _NOT_VERBS:
            found[path.stem] = path.read_text().split('"""')[1].splitlines()[0]
    return found


def main() -> None:
    """Run the verb that the command line names."""
    known = verbs()
    if len(sys.argv) < 2 or sys.argv[1] not in known:
        print("usage: llava-accel VERB ...   (VERB --help shows an example)\n")
        for name, line in known.items():
            print(f"  {name:10} {line}")
        sys.exit(0 if sys.argv[1:] in ([], ["-h"], ["--help"]) else 2)
    del sys.argv[0]
    runpy.run_module(f"llava_accel.{sys.argv[0]}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
