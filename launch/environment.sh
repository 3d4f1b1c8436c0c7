# Sourced by quickstart.sh and test.sh: makes .venv in the repository's root unless a virtual environment is active.
# Usage: source launch/environment.sh EXTRA[,EXTRA...] [floor]
# "floor" always makes an environment of its own, .venv-floor, with the versions of constraints-floor.txt.

venv=.venv${2:+-$2}
constraints=launch/constraints${2:+-$2}.txt
if [ -n "${2:-}" ] || [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
  if [ ! -x "$venv/bin/python" ]; then
    python=""
    for candidate in python3.11 python3.12 python3.13 python3; do
      if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        python=$candidate
        break
      fi
    done
    if [ -z "$python" ]; then
      echo "error: Python 3.11 or newer is needed and none was found on the PATH." >&2
      exit 1
    fi
    echo "making $venv with $($python --version)"
    "$python" -m venv "$venv"
  fi
  # shellcheck disable=SC1091
  source "$venv/bin/activate"
fi

# A stamp of what was installed: a second start goes straight to work.
stamp="$(python -c 'import sys; print(sys.prefix)')/.llava-accel-$1"
if [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ "$constraints" -nt "$stamp" ]; then
  echo "installing (a few minutes the first time)"
  # torch first and pinned: a bare requirement would take the newest build for a GPU, several gigabytes.
  python -m pip install --quiet --quiet --disable-pip-version-check --constraint "$constraints" torch
  python -m pip install --quiet --quiet --disable-pip-version-check --constraint "$constraints" --editable ".[$1]"
  touch "$stamp"
fi
