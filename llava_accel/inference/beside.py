"""The base's own answers from a model that holds what was trained too: no weight is loaded twice."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from peft import PeftModel

from llava_accel.inference.origin import Loaded, Trained
from llava_accel.model.lora import FROM_WEIGHTS


def why_no_base(trained: Trained, loaded: Loaded) -> str:
    """Why the base cannot answer beside what was trained; empty where it can."""
    if trained.kind == "model":
        return "a whole model has no base in it"
    if loaded.processing.base.layout == "parts":
        return "the base is made of parts, whose projector is what was trained"
    variant = trained.recipe.model.lora.variant
    return f"{variant} has changed the base's own weights" if trained.kind == "lora" and variant in FROM_WEIGHTS else ""


@contextmanager
def as_base(loaded: Loaded) -> Iterator[None]:
    """In the block the model is the base, bit for bit: without LoRA layers, and with its own weights where others took
    their place. It takes a model that was loaded with `keep_base`, and one for which `why_no_base` is empty."""
    model = loaded.objective.model
    trained = {parameter: parameter.data for parameter in loaded.replaced}
    with warnings.catch_warnings():
        # peft cannot disable biases that were trained; they are among the weights that change places here.
        warnings.filterwarnings("ignore", message="Careful, disabling adapter layers with bias")
        with model.disable_adapter() if isinstance(model, PeftModel) else nullcontext():
            try:
                for parameter, value in loaded.replaced.items():
                    parameter.data = value.to(parameter.device)
                yield
            finally:
                for parameter, value in trained.items():
                    parameter.data = value
