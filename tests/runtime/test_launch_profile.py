"""A launch profile that contradicts the recipe is refused, with key, value and remedy, before anything is loaded."""

from pathlib import Path

import pytest

from helpers.runs import recipe
from llava_accel.exceptions import UserError
from llava_accel.runtime import zero as backend_deepspeed
from llava_accel.runtime.launch_profile import Backend, Profile, read_profile


@pytest.mark.parametrize(
    ("backend", "variable", "value", "shown"),
    [
        ("ddp", "ACCELERATE_MIXED_PRECISION", "fp16", "mixed_precision is 'fp16'"),
        ("ddp", "ACCELERATE_MIXED_PRECISION", "bf16", "mixed_precision is 'bf16'"),
        ("deepspeed", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "gradient_accumulation_steps is '4'"),
        ("deepspeed", "ACCELERATE_GRADIENT_CLIPPING", "0.5", "gradient_clipping is '0.5'"),
        ("deepspeed", "ACCELERATE_GRADIENT_CLIPPING", "some", "gradient_clipping is 'some'"),
        ("deepspeed", "ACCELERATE_DEEPSPEED_ZERO3_INIT", "true", "zero3_init_flag is 'true'"),
        ("fsdp", "FSDP_VERSION", "1", "fsdp_version is '1'"),
        ("fsdp", "FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "fsdp_cpu_ram_efficient_loading is 'true'"),
        ("fsdp", "FSDP_ACTIVATION_CHECKPOINTING", "true", "fsdp_activation_checkpointing is 'true'"),
    ],
)
def test_a_profile_that_contradicts_the_recipe_is_refused(
    tmp_path: Path, backend: Backend, variable: str, value: str, shown: str
) -> None:
    with pytest.raises(ValueError, match=shown) as caught:
        Profile(backend, {"FSDP_VERSION": "2", variable: value}).check(recipe(tmp_path), "no")
    assert any(word in str(caught.value) for word in ("Write ", "Leave "))


@pytest.mark.parametrize("backend", ["none", "ddp", "deepspeed", "fsdp"])
def test_what_agrees_with_the_recipe_is_accepted(tmp_path: Path, backend: Backend) -> None:
    agreeing = {
        "FSDP_VERSION": "2",
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
        "ACCELERATE_GRADIENT_CLIPPING": "1.0",
    }
    Profile(backend, agreeing).check(recipe(tmp_path), "no")


@pytest.mark.parametrize("backend", ["deepspeed", "fsdp"])
def test_eight_bits_are_refused_where_weights_or_moments_are_divided(tmp_path: Path, backend: Backend) -> None:
    changed = recipe(tmp_path, model={"quantization": {"bits": 8}}, optim={"optimizer": "adamw_8bit"})
    with pytest.raises(ValueError, match=r"quantization\.bits = 8(.|\n)*adamw_8bit"):
        Profile(backend, {"FSDP_VERSION": "2"}).check(changed, "no")


@pytest.mark.parametrize(
    ("backend", "stage", "refused"),
    [("ddp", "", False), ("deepspeed", "2", False), ("deepspeed", "3", True), ("fsdp", "", True)],
)
def test_compiled_layers_are_refused_where_weights_are_gathered(
    tmp_path: Path, backend: Backend, stage: str, refused: bool
) -> None:
    profile = Profile(backend, {"FSDP_VERSION": "2", "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage})
    changed = recipe(tmp_path, model={"compile": True})
    if refused:
        with pytest.raises(ValueError, match=r"model\.compile = true is not supported with .*Set false"):
            profile.check(changed, "no")
    else:
        profile.check(changed, "no")


@pytest.mark.parametrize(
    ("extra", "shown"),
    [
        ('"gradient_clipping": 0.5', "gradient_clipping is 0.5"),
        ('"train_micro_batch_size_per_gpu": 3', "train_micro_batch_size_per_gpu is 3"),
        ('"optimizer": {"type": "AdamW"}', "'optimizer' is in"),
        ('"fp16": {"enabled": true}', "fp16 is enabled"),
    ],
)
def test_a_deepspeed_file_that_contradicts_the_recipe_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: str, shown: str
) -> None:
    (tmp_path / "ds.json").write_text(f'{{"zero_optimization": {{"stage": 2}}, {extra}}}')
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "ds.json"))
    with pytest.raises(ValueError, match=shown):
        backend_deepspeed.configured_plugin(recipe(tmp_path), on_cpu=True)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"train_batch_size": 4}'])
def test_a_deepspeed_file_that_cannot_be_used_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "ds.json").write_text(content)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "ds.json"))
    with pytest.raises(UserError, match=r"deepspeed_config_file is '.*ds\.json' in the launch profile, .* Correct the"):
        backend_deepspeed.configured_plugin(recipe(tmp_path), on_cpu=True)


def test_the_recipes_clipping_is_written_out_even_when_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", raising=False)
    settings = recipe(tmp_path, optim={"max_grad_norm": 0.0})
    config = backend_deepspeed.configured_plugin(settings, on_cpu=True).deepspeed_config
    assert config["gradient_clipping"] == 0.0
    assert config["gradient_accumulation_steps"] == 1
    assert config["zero_optimization"]["overlap_comm"] is False


PROFILES = sorted((Path(__file__).parents[2] / "launch").glob("*.yaml"))


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
def test_a_profile_explains_every_line(profile: Path) -> None:
    lines = profile.read_text().splitlines()
    assert not [line for line in lines if line and "#" not in line]
    assert f"--config_file launch/{profile.name} " in "\n".join(lines)


@pytest.mark.parametrize(
    "left", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": ""}, {"RANK": ""}, {"LOCAL_RANK": "x"}, {"LOCAL_WORLD_SIZE": "-1"}]
)
def test_a_part_of_a_launchers_variables_that_was_left_behind_is_told(
    monkeypatch: pytest.MonkeyPatch, left: dict[str, str]
) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert read_profile().backend == "none"
    name, value = next(iter(left.items()))
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"the environment has {name} = '{value}'.* Unset it"):
        read_profile()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv(name, "2")
    assert read_profile().backend == ("ddp" if name == "WORLD_SIZE" else "none")
