"""What a run says of its scores at its end."""

import json
from pathlib import Path

import pytest

from llava_accel.console.output import Console
from llava_accel.loop.finish import show_evaluations
from llava_accel.scoring.metrics import METRICS, SCORES
from llava_accel.setup.state import TrainState


@pytest.mark.parametrize("count", [2, len(METRICS)])
def test_each_score_can_be_read_in_80_columns(count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {name: 0.5 for name in list(METRICS)[:count]}
    values |= {f"{end}_{name}": value for name in list(values) for end, value in (("low", 0.4), ("high", 0.6))}
    values |= {f"common_{name}": 0.25 for name in list(METRICS)[:count]} | {"loss": 1.0, "num_answers": 8.0}
    lines = [{"step": step, "eval": values} for step in (0, 2, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    show_evaluations(tmp_path, TrainState(num_steps=4, steps_per_epoch=2, step=4), Console(True))
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert said.count("50.0 ±") == 3 * count and said.count("25.0 %") == count
    for word in " ".join(SCORES[name] for name in list(METRICS)[:count]).split():
        assert word in said
