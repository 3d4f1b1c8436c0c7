"""Commands that helpers/forked.py starts end, say and know what they would as processes of their own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.forked import Forked, run

pytestmark = pytest.mark.slow

SHOWS = """
import json, os, signal, sys, tempfile
known = [sys.argv[1:], os.getcwd(), os.environ.get("OWN"), tempfile.gettempdir(), __name__, os.getsid(0) == os.getpid()]
handlers = [str(signal.getsignal(one)) for one in (signal.SIGINT, signal.SIGTERM)]
print(json.dumps([*known, *handlers, sys.stdin.read(), "OTHER" in os.environ]))
"""


@pytest.mark.parametrize("how", [["-c", SHOWS], ["shows.py"], ["-m", "shows"]], ids=["code", "file", "module"])
def test_a_command_knows_what_it_is_given(how: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shows.py").write_text(SHOWS)
    monkeypatch.setenv("OTHER", "yes")
    variables = {key: value for key, value in os.environ.items() if key != "OTHER"}
    variables |= {"OWN": "a b", "TMPDIR": str(tmp_path)}
    said = []
    for kind in (Forked, subprocess.Popen):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
        with kind([sys.executable, *how, "one", "two three"], cwd=tmp_path, env=variables, **pipes) as process:
            said.append(json.loads(process.communicate("asked")[0]))
    assert said[0] == said[1] and said[0][0] == ["one", "two three"]


@pytest.mark.parametrize(
    "code",
    [
        "pass",
        "import sys; sys.exit(7)",
        "import sys; print('a'); sys.exit('a word')",
        "raise SystemExit(None)",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import atexit; atexit.register(print, 'the end')",
    ],
)
def test_it_ends_in_the_same_way(code: str) -> None:
    forked, started = (run([sys.executable, "-c", code], how) for how in (Forked, subprocess.Popen))
    assert (forked.returncode, forked.stdout, forked.stderr) == (started.returncode, started.stdout, started.stderr)


def test_an_error_is_a_traceback_and_a_signal_arrives() -> None:
    broken = run([sys.executable, "-c", "raise ValueError('what is wrong')"])
    assert broken.returncode == 1 and broken.stderr.rstrip().endswith("ValueError: what is wrong")
    waits = "import time; print('here', flush=True); time.sleep(60)"
    with Forked([sys.executable, "-c", waits], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "here\n" and process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == -signal.SIGTERM
