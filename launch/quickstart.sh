#!/usr/bin/env bash
# One command from a fresh clone to a fine-tuned LLaVA: installs, prepares easy-VQA, and runs recipes/quickstart.toml,
# the same loop and recipe format as a 7B run, on a tiny LLaVA that ships with the package. No GPU, no download of models.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh quickstart

export TOKENIZERS_PARALLELISM=false
if [ ! -f data/easy_vqa/test.jsonl ]; then
  llava-accel prepare easy-vqa --out data/easy_vqa | sed '/^next: /d' # what comes next is below
fi
llava-accel train recipes/quickstart.toml "$@"
