"""The base's own answers from a model with trained weights: no weight is loaded twice."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from peft import PeftModel

from llava_accel.inference.origin import Loaded, Trained
from llava_accel.model.lora import FROM_WEIGHTS


def why_no_base(trained: Trained, loaded: Loaded) -> str:
    """Why the base cannot answer beside the trained model; empty where it can."""
    if trained.kind == "model":
        return "a whole model has no base in it"
    if loaded.processing.base.layout == "parts":
        return "the base is made of parts, and has no projector but the trained one"
    variant = trained.recipe.model.lora.variant
    return f"{variant} has changed the base's own weights" if trained.kind == "lora" and variant in FROM_WEIGHTS else ""


@contextmanager
def as_base(loaded: Loaded) -> Iterator[None]:
    """In the block the model is the base, bit for bit: without LoRA layers, and with the base's own weights in place of
    trained ones. The model must have been loaded with `keep_base`, and `why_no_base` must be empty for it."""
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
