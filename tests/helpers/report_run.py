"""A run folder as a run leaves it, made in milliseconds: curves, answers of ten annotators, images, types."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from llava_accel.recipe import dump_recipe, make_recipe
from llava_accel.scoring.vqa import exact_match, vqa_accuracy

HOSTILE = (
    '<script>document.title = "taken"</script><img src=x onerror="document.title=1"> '
    "\x00\x07\x1b[31m\u202egnp.exe\ud800"
)
"""What a data set may hold: markup, control characters, a mark that turns the text around, half a surrogate pair."""

_COLORS = {"red": "#d43c32", "green": "#3fa34d", "blue": "#3a6fd8", "yellow": "#e8c33b", "purple": "#8e4fb5"}
_SHAPES = ("circle", "square", "triangle")


def write_run(
    folder: Path,
    *,
    name: str = "okvqa_qlora",
    seed: int = 0,
    num_steps: int = 400,
    skill: float = 0.75,
    num_questions: int = 160,
    hostile: bool = False,
    overfits: bool = False,
    evaluations: bool = True,
    **tables: dict[str, Any],
) -> Path:
    """Write `folder/NAME` and the images that it is about, and return the run folder.

    Args:
        skill: Share of right answers at the end.
        hostile: Put `HOSTILE` into one record wherever a text can stand.
        overfits: Let the evaluation loss rise in the second half.
        tables: Keys of the recipe that differ.
    """
    draw = random.Random(seed)
    run = folder / name
    (run / "predictions").mkdir(parents=True)
    images = folder / "images"
    _images(images, 40)
    recipe = {
        "run": {"name": name, "output_dir": str(run)},
        "model": {"base": "llava-hf/llava-1.5-7b-hf", "quantization": {"bits": 4}},
        "data": {"train": "data/okvqa/train.jsonl", "eval": "data/okvqa/val.jsonl", "images": str(images)},
        "eval": {"metric": "vqa_accuracy", "every": 50},
    }
    recipe = {key: {**recipe.get(key, {}), **tables.get(key, {})} for key in (*recipe, *tables)}
    (run / "recipe.toml").write_text(dump_recipe(make_recipe(recipe)))
    (run / "environment.json").write_text(json.dumps(_environment(name)))
    lines: list[dict[str, Any]] = []
    for step in range(num_steps + 1):
        if step:
            lines.append(_line(step, num_steps, draw))
        if evaluations and step % 50 == 0:
            share = skill * (1 - math.exp(-step / 120)) + 0.06
            rows = _answers(num_questions, share, random.Random(seed + step), hostile)
            name_of_file = f"step-{step:06d}.jsonl"
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (run / "predictions" / name_of_file).write_text(text)
            lines.append(_evaluation(step, num_steps, rows, overfits))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def _line(step: int, num_steps: int, draw: random.Random) -> dict[str, Any]:
    rate = min(1.0, step / 20) * (1 + math.cos(math.pi * step / num_steps)) / 2
    return {
        "step": step,
        "epoch": round(3 * step / num_steps, 4),
        "loss": 0.6 + 2.4 * math.exp(-step / 60) + draw.gauss(0, 0.08) - 0.3 * step / num_steps,
        "learning_rate": 2e-4 * rate,
        "learning_rate/language_model": 2e-4 * rate,
        "learning_rate/projector": 2e-5 * rate,
        "grad_norm": 0.4 + 3 * math.exp(-step / 40) * abs(draw.gauss(1, 0.3)) + abs(draw.gauss(0, 0.08)),
        "num_targets": 210,
        "num_tokens": 10_000,
        "num_examples": 16,
        "tokens_per_s": draw.gauss(4200, 180),
        "seconds": 2.4,
        "data_wait_s": 0.05,
        "forward_s": 0.4,
        "backward_s": 0.5,
        "evaluation_s": 0.2,
        "peak_memory_gib": 17.25 if step > 30 else 16.5,
    }


def _evaluation(step: int, num_steps: int, rows: Sequence[dict[str, Any]], overfits: bool) -> dict[str, Any]:
    loss = 0.9 + 2.6 * math.exp(-step / 70) + (max(0.0, step / num_steps - 0.5) if overfits else 0.0)
    score = sum(row["vqa_accuracy"] for row in rows) / len(rows)
    match = sum(row["exact_match"] for row in rows) / len(rows)
    blind = 0.6 * score
    values = {"loss": loss, "num_answers": float(len(rows)), "vqa_accuracy": score, "exact_match": match}
    values |= {"blind_num_answers": 100.0, "blind_vqa_accuracy": blind, "blind_exact_match": 0.9 * blind}
    return {"step": step, "epoch": round(3 * step / num_steps, 4), "eval": values, "seconds": 41.5}


def _answers(count: int, share: float, draw: random.Random, hostile: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    facts = random.Random(7)  # the questions are the same in every evaluation
    for number in range(count):
        color, shape = facts.choice(list(_COLORS)), facts.choice(_SHAPES)
        kind = ("color", "shape", "presence")[number % 3]
        question = {
            "color": f"What colour is the {shape}?",
            "shape": f"Which shape is {color}?",
            "presence": f"Is there a {color} {shape} in the image?",
        }[kind]
        right = {"color": color, "shape": shape, "presence": "yes"}[kind]
        other = {"color": "orange", "shape": "oval", "presence": "no"}[kind]
        answers = {right: 7, f"{right}ish": 2, other: 1} if number % 4 else {right: 10}
        prediction = right if draw.random() < share else draw.choice([other, f"{right}ish", "a dog", ""])
        row = {"id": str(5_000 + number), "image": f"{number % 40}.png", "question": question, "answers": answers}
        if hostile and number == 0:
            row |= {"id": HOSTILE, "question": HOSTILE, "answers": {HOSTILE: 9, "two": 1}, "image": f"../{HOSTILE}"}
            prediction, kind = HOSTILE if share > 0.5 else "two", HOSTILE
        accuracy = vqa_accuracy(prediction, row["answers"])
        row |= {"prediction": prediction, "score": accuracy, "vqa_accuracy": accuracy}
        row |= {"exact_match": exact_match(prediction, row["answers"]), "question_type": kind}
        row |= {"answer_type": "yes/no" if kind == "presence" else "other", "loss": abs(draw.gauss(0.8, 0.7))}
        rows.append(row)
    return rows


def _images(folder: Path, count: int) -> None:
    """Scenes of two shapes, in landscape, portrait and square."""
    folder.mkdir(exist_ok=True)
    draw = random.Random(3)
    for number in range(count):
        width, height = ((640, 480), (480, 640), (512, 512))[number % 3]
        image = Image.new("RGB", (width, height), f"hsl({draw.randrange(360)}, 35%, 85%)")
        canvas = ImageDraw.Draw(image)
        for _ in range(2):
            x, y, r = draw.randrange(90, width - 90), draw.randrange(90, height - 90), draw.randrange(40, 90)
            color, shape = draw.choice(list(_COLORS.values())), draw.choice(_SHAPES)
            if shape == "circle":
                canvas.ellipse((x - r, y - r, x + r, y + r), fill=color)
            elif shape == "square":
                canvas.rectangle((x - r, y - r, x + r, y + r), fill=color)
            else:
                canvas.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=color)
        image.save(folder / f"{number}.png")


def _environment(name: str) -> dict[str, Any]:
    return {
        "command": f"llava-accel train recipes/{name}.toml optim.learning_rate=1e-4",
        "python": "3.11.7",
        "packages": {"llava-accel": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"},
        "platform": "Linux-6.1-x86_64",
        "cpu_count": 16,
        "device": "NVIDIA RTX 4090",
        "backend": "NO",
        "num_processes": 1,
        "mixed_precision": "bf16",
        "git_commit": "0123456789abcdef0123456789abcdef01234567",
    }
