"""A push asks nothing, shows what it would send, and never the token."""

import socket
from pathlib import Path

import pytest
from huggingface_hub import constants

from helpers.exported import assert_same, export, logits


def test_dry_run_lists_what_would_be_sent_and_opens_no_connection(
    lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    out = export(monkeypatch, lora_run, "peft", tmp_path / "peft", "--push", "someone/adapter", "--dry-run")
    said = capsys.readouterr().out
    for path in out.iterdir():
        assert path.name in said and f"{path.stat().st_size:,}" in said


def test_push_that_fails_keeps_the_export_and_the_token_to_itself(
    lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, token = tmp_path / "peft", "hf_" + "s" * 34
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(SystemExit, match="2"):
        export(monkeypatch, lora_run, "peft", out, "--push", "someone/adapter")
    said = capsys.readouterr()
    assert f"hf upload someone/adapter {out}" in said.err and "Traceback" not in said.err
    assert token not in said.out + said.err
    assert_same(logits(lora_run), logits(out))


def test_push_without_a_token_is_refused_before_anything_is_made(
    lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llava_accel.release.publish.get_token", lambda: None)
    with pytest.raises(SystemExit, match="2"):
        export(monkeypatch, lora_run, "peft", tmp_path / "peft", "--push", "someone/adapter")
    assert "hf auth login" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
