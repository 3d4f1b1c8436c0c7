#!/usr/bin/env bash
# Sets everything up and runs lint, types and the suite. `--setup-only` stops before them.
# `--fast` leaves out types and what is marked slow: two minutes on two cores.
# Anything else is handed to pytest: bash launch/test.sh tests/data -k labels
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh test,deepspeed
[ "${1:-}" = "--setup-only" ] && exit 0

# Few threads: multi-process tests on a small machine slow each other down about tenfold otherwise.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
command -v chromium >/dev/null || command -v google-chrome >/dev/null || echo "no Chromium here: the report's page is not tested in a browser"
ruff check .
ruff format --check .
# Two processes; tests that share a fixture stay in one of them (tests/conftest.py).
pytest=(python -m pytest --numprocesses 2 --dist loadgroup --no-loadscope-reorder)
if [ "${1:-}" = "--fast" ]; then
  "${pytest[@]}" -m "not slow" "${@:2}"
else
  pyright
  "${pytest[@]}" "$@"
fi
