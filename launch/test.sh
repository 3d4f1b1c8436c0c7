#!/usr/bin/env bash
# Sets everything up and runs lint, types and the suite. `--setup-only` stops before them.
# `--floor` runs the fast tests alone, in .venv-floor, with the lowest versions that pyproject.toml allows.
# Anything else is handed to pytest: bash launch/test.sh tests/data -k labels
set -euo pipefail
cd "$(dirname "$0")/.."

# The tests that are run on the floors: reading data, labels, images, recipe, model, LoRA, exact objective, saving, training.
FLOOR_TESTS=(
  tests/data/test_{table,records,labels,images,pictures,collate,text_encoder,chat_template}.py
  tests/test_recipe.py
  tests/model/test_{processing,build,lora,adapters,quantize,objective}.py
  tests/run/test_{optim,state,storage,trackers}.py
  tests/test_{exact,parity,train_script}.py
  # Two processes under each engine, DeepSpeed and FSDP2 among them.
  tests/test_backends.py::test_plain_gradient_descent_hides_no_wrong_scale
)

floor=""
if [ "${1:-}" = "--floor" ]; then
  floor=floor
  shift
fi
# shellcheck disable=SC1091
source launch/environment.sh test,deepspeed $floor
[ "${1:-}" = "--setup-only" ] && exit 0

# Few threads: multi-process tests on a small machine slow each other down about tenfold otherwise.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
if [ -n "$floor" ]; then
  python -m pytest "${FLOOR_TESTS[@]}" "$@"
  exit
fi
command -v chromium >/dev/null || command -v google-chrome >/dev/null || echo "no Chromium here: the report's page is not tested in a browser"
ruff check .
ruff format --check .
pyright
python -m pytest "$@"
