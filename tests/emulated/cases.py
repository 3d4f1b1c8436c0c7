"""The runs of switches.py on the CPU and on the emulated device. For the process of worker.py."""

import argparse
import base64
import contextlib
import io
import json
import re
import shutil
import socketserver
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState

import llava_accel.train as verb
from emulated.device import Device, DeviceTensor
from emulated.switches import RECIPES, RUNS, STEPS, TOKENS, WINDOW, Keys, Life, Seen, Wait
from helpers.exported import prove_here
from helpers.runs import (
    PARITY,
    losses,
    metrics,
    mixed_records,
    on_tiny,
    pairs,
    predictions,
    tables,
    talk,
    without_times,
    write_records,
)  # fmt: skip
from helpers.tiny import VOCABULARY, make_llava, task_base
from helpers.verbs import start
from llava_accel import bench as bench_verb
from llava_accel import serve
from llava_accel.chat import open_dialogue
from llava_accel.console.door import open_door
from llava_accel.exceptions import UserError
from llava_accel.kernels.compiled import compile_layers
from llava_accel.loop import machine
from llava_accel.loop.update_guard import UpdateGuard
from llava_accel.model import objective
from llava_accel.plan import plan
from llava_accel.recipe import Recipe, make_recipe
from llava_accel.scoring import held_out
from llava_accel.setup import assembly
from llava_accel.setup.state import TrainState

PARTS = {"lora, logits in parts": 5 * VOCABULARY}
"""Logits that are made at once, where that is no key of the recipe."""


OWN = """import torch


def build(groups, table):
    return torch.optim.RMSprop(groups, lr=table.learning_rate)

def read(row):
    return row
"""
"""Code of a user's own."""
_expected: dict[str, list[float]] = {}


def prepare(folder: Path) -> None:
    """Bases and records of all cases."""
    make_llava(folder / "tiny")
    task_base(folder / "task", folder / "tiny")
    mixed = [record | {"answers": {"red": 2, "blue": 1}} for record in mixed_records(12)]
    write_records(folder / "mixed.json", mixed)
    write_records(folder / "text.json", [talk(n, f"What is {n}?", "It is " + "so " * (n % 4)) for n in range(12)])
    write_records(folder / "task.json", [talk(n, "Where?", f"<box>{n}<loc_{1 + n % 2}>", "t1.png") for n in range(12)])
    write_records(folder / "eval.json", mixed_records(5))
    write_records(folder / "pairs.json", pairs(12))
    (folder / "own.py").write_text(OWN)


def read_once(load: Callable[..., Any]) -> Callable[..., Any]:
    """The same tokenizer and templates for the same [model]."""
    kept: dict[str, Any] = {}

    def load_kept(model: object, image_aspect: str) -> Any:
        key = f"{model!r} {image_aspect}"
        kept[key] = kept.get(key) or load(model, image_aspect)
        return kept[key]

    return load_kept


def recipe(folder: Path, name: str, keys: Keys) -> Recipe:
    """A short run of these keys.

    Args:
        folder: That of `prepare`.
        name: Of the run, whose folder is emptied.
    """
    own = folder / "runs" / re.sub(r"\W+", "-", name)
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(parents=True)
    changes: dict[str, dict[str, Any]] = {table: dict(values) for table, values in keys.items()}
    sizes = {"max_steps": STEPS, "per_device_batch_size": 2, "accumulation_steps": WINDOW}
    changes["train"] = sizes | changes.get("train", {})
    data = changes.setdefault("data", {})
    sources = data.get("train", "mixed.json")
    if isinstance(sources, str):
        data["train"] = str(folder / sources)
    else:
        data["train"] = [source | {"path": str(folder / source["path"])} for source in sources]
    data["eval"] = str(folder / data["eval"]) if data.get("eval") else ""
    for table, key in (("data", "reader"), ("optim", "optimizer")):
        if (value := changes.get(table, {}).get(key, "")).startswith("own.py"):
            changes[table][key] = str(folder / value)
    base = changes.setdefault("model", {}).pop("base", "tiny")
    if (folder / base).is_dir():
        return make_recipe(on_tiny(folder / base, own, folder / "mixed.json", **changes))
    changes["model"] |= {"base": str(PARITY / "next" / "bases" / base), "vision_tower": "", "adapter": ""}
    return make_recipe(tables(own, **changes))


@contextlib.contextmanager
def on(device: bool) -> Iterator[list[Wait]]:
    """The emulated device, or the CPU; the waits of the block."""
    AcceleratorState._reset_state(True)
    if not device:
        yield []
        return
    with Device() as emulated:
        yield emulated.waits


def train(wanted: Recipe, *, on_device: bool) -> Seen:
    """Train, and say what was seen."""
    with on(on_device) as waits:
        state = verb.train(wanted)
    run = Path(wanted.run.output_dir)
    return Seen(losses(run), waits, sum("loss" in line for line in metrics(run)), state.step)


def run(folder: Path, name: str, precision: str) -> tuple[list[float], Seen]:
    """Losses on the CPU in fp32, and the same run on the device in a precision."""
    keys = RUNS[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective, "LOGITS_AT_ONCE", PARTS.get(name, objective.LOGITS_AT_ONCE))
        # torch.compile leaves alone what runs under a dispatch mode, as the device is one, and has no device to write code
        # for: what runs here is all that is around a compiled layer, and the layer as it is.
        patch.setattr(machine, "require_compiler", lambda device: None)
        patch.setattr(assembly, "compile_layers", partial(compile_layers, backend="eager"))
        if name not in _expected:
            _expected[name] = train(recipe(folder, f"{name} cpu", keys), on_device=False).losses
        wanted = recipe(folder, f"{name} {precision}", {**keys, "run": {**keys.get("run", {}), "precision": precision}})
        return _expected[name], train(wanted, on_device=True)


def spoilt(folder: Path, how: str) -> Seen:
    """The run "lora" with a wait put back into it, or with a tensor left on the CPU."""
    watched_loss, forward = UpdateGuard.watched_loss, objective.Objective.forward

    def waiting_loss(self: UpdateGuard, losses: Any, divisors: Any) -> Any:
        float(losses[0])
        return watched_loss(self, losses, divisors)

    def waiting_forward(self: objective.Objective, **batch: Any) -> Any:
        batch["target_weights"] = batch["target_weights"].cpu().to(batch["input_ids"].device)
        return forward(self, **batch)

    def mixing_forward(self: objective.Objective, **batch: Any) -> Any:
        return forward(self, **batch | {"target_weights": batch["target_weights"].cpu()})

    with pytest.MonkeyPatch.context() as patch:
        if how == "a wait a step":
            patch.setattr(UpdateGuard, "watched_loss", waiting_loss)
        elif how == "a wait a micro-batch":
            patch.setattr(objective.Objective, "forward", waiting_forward)
        else:
            patch.setattr(objective.Objective, "forward", mixing_forward)
        return train(recipe(folder, how, {}), on_device=True)


def live(folder: Path, train_what: str, *, on_device: bool) -> Life:
    """A run with evaluations and checkpoints that is broken off before its end, goes on from its first step, and is
    exported and proven; what LoRA made is then exported in another form, and asked a question."""
    keys: Keys = {
        "run": {"precision": "fp32"},
        "model": {"train": train_what},
        "data": {"eval": "eval.json"},
        "eval": {
            "at_start": True, "every": 2, "blind_limit": 3, "train_limit": 3, "max_new_tokens": TOKENS,
            "metrics": ["vqa_accuracy", "rouge_l", "cider", f"{RECIPES / 'my_scores.py'}:anls_de"],
        },
        "checkpoint": {"every": 1, "keep": STEPS, "verify": True, "background": train_what == "full"},
    }  # fmt: skip
    wanted = recipe(folder, f"life of {train_what} {on_device}", keys)
    run, said, answered = Path(wanted.run.output_dir), io.StringIO(), 0
    answer_batch = held_out.answer_batch

    def counted(*arguments: Any, **settings: Any) -> Any:
        nonlocal answered
        answered += 1
        return answer_batch(*arguments, **settings)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        prove_here(patch)
        patch.setattr(held_out, "answer_batch", counted)
        with mock.patch.object(verb, "finish"):
            waits = train(wanted, on_device=on_device).waits
        for step in range(2, STEPS + 1):
            shutil.rmtree(run / "checkpoints" / f"step-{step:06d}")
        waits = waits + train(wanted, on_device=on_device).waits
        number = answered
        with on(on_device):
            ended = {name: start(name, *words) for name, words in _verbs(run).items() if train_what == "lora"}
            answer = _served(run) if ended else ""
    lines = without_times(metrics(run))
    found = predictions(run / "predictions" / f"step-{STEPS:06d}.jsonl")[0]
    return Life(
        lines, found, said.getvalue(), waits, number, {v: (e.code, e.out, e.err) for v, e in ended.items()}, answer
    )


def _verbs(run: Path) -> dict[str, list[str]]:
    image = str(PARITY / "images" / "t1.png")
    return {
        "export": [str(run), "--to", "merged", "--out", str(run.parent / "merged"), "--compare"],
        "chat": ["--adapter", str(run), "--image", image, "--max-new-tokens", str(TOKENS), "--once", "Red?"],
    }


def _served(run: Path) -> str:
    """What `serve` answers to a question about an image."""
    image = base64.b64encode((PARITY / "images" / "t1.png").read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
        {"type": "text", "text": "?"},
    ]
    request = {"model": "mine", "messages": [{"role": "user", "content": content}], "max_tokens": TOKENS}
    named: dict[str, Any] = {"adapter": str(run), "base": "", "template": "", "bits": None, "system": None, "image": []}
    options = argparse.Namespace(**named, max_new_tokens=TOKENS)
    found: list[str] = []

    def ask(port: int) -> None:
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        headers = {"Authorization": "Bearer a-key-of-the-tests"}
        connection.request("POST", "/v1/chat/completions", json.dumps(request), headers)
        found.append(connection.getresponse().read().decode())

    # A request is answered in this thread, which alone sees the device.
    with mock.patch.object(serve.Server, "process_request", socketserver.BaseServer.process_request):
        with serve.Server(open_door(0), open_dialogue(options, print), "mine", "a-key-of-the-tests") as server:
            client = threading.Thread(target=ask, args=(server.server_port,))
            client.start()
            server.handle_request()
            client.join()
    return json.loads(found[0])["choices"][0]["message"]["content"]


def overflow(folder: Path) -> tuple[list[float], Seen, int]:
    """The losses of an fp16 run, the same run from a loss scale that is far too large, and how often that was halved."""
    keys: Keys = {"run": {"precision": "fp16"}}
    expected = train(recipe(folder, "no overflow", keys), on_device=True).losses
    wanted, new_state = recipe(folder, "overflow", keys), TrainState.of

    def far_too_large(*arguments: Any) -> TrainState:
        state = new_state(*arguments)
        state.loss_scale = 2.0**24
        return state

    with mock.patch.object(TrainState, "of", far_too_large):
        seen = train(wanted, on_device=True)
    return expected, seen, metrics(Path(wanted.run.output_dir))[-1]["num_overflows"]


def not_a_number(folder: Path, then: str, *, on_device: bool) -> tuple[list[dict[str, Any]], str]:
    """What a run notes of a gradient that is not finite, and the error that it ends with, if it does."""
    keys = {"optim": {"learning_rate": 1e30}, "train": {"on_nonfinite": then}, "run": {"precision": "fp32"}}
    wanted, said = recipe(folder, f"{then} {on_device}", keys), ""
    try:
        train(wanted, on_device=on_device)
    except UserError as error:
        said = str(error)
    lines = (Path(wanted.run.output_dir) / "nonfinite.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], said.replace(wanted.run.output_dir, "RUN")


def out_of_memory(folder: Path, where: str) -> str:
    """The error of a run whose device is full in a step or an update; of an evaluation, what is said when it is answered in
    halves."""
    from accelerate.optimizer import AcceleratedOptimizer

    def run_out(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    answer_batch, encode = held_out.answer_batch, objective.Objective.encode

    def encode_nothing(self: objective.Objective, tiles: torch.Tensor, names: torch.Tensor) -> Any:
        return run_out() if isinstance(tiles, DeviceTensor) else encode(self, tiles, names)

    def answer_few(model: Any, batch: Any, questions: Any, **settings: Any) -> Any:
        return run_out() if len(questions.rows) > 1 else answer_batch(model, batch, questions, **settings)

    keys = {"data": {"eval": "eval.json"}} if where == "evaluation" else {}
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        owner, name, instead = {
            "step": (objective.Objective, "encode", encode_nothing),
            "update": (AcceleratedOptimizer, "step", run_out),
            "evaluation": (held_out, "answer_batch", answer_few),
        }[where]
        patch.setattr(owner, name, instead)
        try:
            train(recipe(folder, f"memory {where}", keys), on_device=True)
        except UserError as error:
            return str(error)
    return said.getvalue()


def bench(folder: Path) -> tuple[dict[str, float], int, int]:
    """What is measured, the waits of its steps, and the steps."""
    steps, train_step = 0, bench_verb.Job.loop.__globals__["train_step"]

    def counted(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        return train_step(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        # The matrices by which a GPU's speed is measured take minutes here.
        patch.setattr(bench_verb, "matrix_rate", lambda device, dtype: 1e12)
        patch.setitem(bench_verb.Job.loop.__globals__, "train_step", counted)
        with on(True) as waits:
            found = bench_verb.bench(recipe(folder, "bench", {}), 2, 1)
    return found, sum(wait.stage == "step" for wait in waits), steps


def probe(folder: Path) -> str:
    """What `plan --probe` says."""
    said = io.StringIO()
    with on(True), contextlib.redirect_stdout(said):
        plan(recipe(folder, "probe", {}), 24.0, 1, probe=True)
    return said.getvalue()
