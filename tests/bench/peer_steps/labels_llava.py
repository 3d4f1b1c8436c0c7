"""Ids and targets of records by LLaVA's own `preprocess`, in its environment.

    python labels_llava.py RECORDS.json TOKENIZER TEMPLATE OUT.json

Writes [ids, is target] of each record; null where it leaves all of it out of the loss with a warning, or refuses it.
"""

import contextlib
import copy
import importlib
import inspect
import io
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

# What trains is not needed here, and slow to import.
for module, name in (("llava.train.llava_trainer", "LLaVATrainer"), ("llava.model", "LlavaLlamaForCausalLM")):
    sys.modules[module] = ModuleType(module)
    setattr(sys.modules[module], name, object)

code: Any = importlib.import_module("llava.train.train")
# With ChatML this version counts a conversation's tokens from 0, and so learns from none of a single round; NeXT's from 1.
exec(inspect.getsource(code.preprocess_mpt).replace("cur_len = 0", "cur_len = 1"), vars(code))
templates: Any = importlib.import_module("llava.conversation")
transformers: Any = importlib.import_module("transformers")


def main() -> None:
    records, tokenizer_folder, template, out = sys.argv[1:]
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        tokenizer_folder, model_max_length=100_000, padding_side="right", use_fast=False
    )
    tokenizer.pad_token = tokenizer.unk_token
    templates.default_conversation = templates.conv_templates[template]
    settings, found = SimpleNamespace(is_multimodal=True, mm_use_im_start_end=False), list[Any]()
    for record in json.loads(Path(records).read_text()):
        turns, said = copy.deepcopy([record["conversations"]]), io.StringIO()
        if "image" in record:
            turns = code.preprocess_multimodal(turns, settings)
        try:
            with contextlib.redirect_stdout(said):
                made = code.preprocess(turns, tokenizer, has_image="image" in record)
        except AssertionError:  # its own checks of turns
            found.append(None)
            continue
        ids, labels = (made[key][0].tolist() for key in ("input_ids", "labels"))
        found.append(None if "mismatch" in said.getvalue() else [ids, [label != -100 for label in labels]])
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
