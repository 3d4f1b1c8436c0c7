#!/usr/bin/env bash
# Sets everything up and runs lint, types and the suite. `--setup-only` stops before them.
# `--fast` leaves out types and what is marked slow: two minutes on two cores.
# `--floor` runs the same tests in .venv-floor, with the lowest versions that pyproject.toml allows, and one run of each
# backend on two processes.
# Anything else is passed to pytest: bash launch/test.sh tests/data -k labels (with `-n 0` in one process)
set -euo pipefail
cd "$(dirname "$0")/.."

mode=whole
case "${1:-}" in
--fast | --floor)
  mode=${1#--}
  shift
  ;;
esac
# shellcheck disable=SC1091
source launch/environment.sh $([ "$mode" = floor ] && echo "test,deepspeed floor" || echo test,deepspeed,web)
if [ "$mode" = whole ] && [ ! -d .transformers4 ]; then
  # Exports are opened with version 4 as well. What it needs besides these is in the environment.
  rm -rf .transformers4.tmp
  python -m pip install --quiet --quiet --disable-pip-version-check --no-deps --target .transformers4.tmp \
    transformers==4.57.1 tokenizers==0.22.1 huggingface_hub==0.36.0
  mv .transformers4.tmp .transformers4
fi
[ "${1:-}" = "--setup-only" ] && exit 0

# Few threads: multi-process tests on a small machine slow each other down about tenfold otherwise.
unset PYTHONDONTWRITEBYTECODE  # else each process that a test starts compiles the package again
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
# Three processes for two cores: now and then one waits for what it has started. Tests that share a fixture stay in one of
# them (tests/conftest.py).
pytest=(python -m pytest --numprocesses 3 --dist loadgroup --no-loadscope-reorder)
if [ "$mode" = floor ]; then
  # Other versions give other warnings: only with the versions of constraints.txt must there be none.
  pytest+=(-W default)
  "${pytest[@]}" -m "not slow" "$@"
  "${pytest[@]}" tests/test_backends.py::test_plain_gradient_descent_hides_no_wrong_scale
  exit
fi
ruff check .
ruff format --check .
if [ "$mode" = fast ]; then
  "${pytest[@]}" -m "not slow" "$@"
else
  command -v "${CXX:-g++}" >/dev/null || command -v c++ >/dev/null || echo "no C++ compiler here: the emulated GPU is not tested"
  command -v chromium >/dev/null || command -v google-chrome >/dev/null || echo "no Chromium here: the report's page is not tested in a browser"
  # Types take what the tests leave of the cores. Their errors are printed after the tests.
  types=$(mktemp)
  nice pyright >"$types" 2>&1 &
  checking=$!
  code=0
  "${pytest[@]}" "$@" || code=$?
  wait "$checking" || code=$?
  cat "$types"
  rm "$types"
  exit "$code"
fi
