"""Which keys of a recipe cannot be combined, and which have no effect in it."""

from collections.abc import Iterator

from llava_accel.recipe.errors import Problem
from llava_accel.recipe.names import DEFAULTS
from llava_accel.recipe.tables import Recipe
from llava_accel.recipe.toml import flatten, toml_value

Conflict = tuple[str, str, str]
"""The keys, separated by spaces; why they exclude each other; what to change."""


def conflicts(recipe: Recipe) -> list[Problem]:
    """Every combination of keys in `recipe` that cannot be run, each naming the keys and what to change."""
    values = flatten(recipe.model_dump())
    excluded = [*_parts(recipe), *_training(recipe), *_pairs(recipe), *_kernels(recipe), *_evaluation(recipe)]
    return [
        Problem({key: None if values[key] == "" else values[key] for key in keys.split()}, expected, remedy)
        for keys, expected, remedy in excluded
    ]


def unused(recipe: Recipe) -> list[str]:
    """A sentence for each key that is set to something but changes nothing in this recipe."""
    return [
        f"{key} = {toml_value(value)} has no effect: {reason}."
        for key, value in changed_keys(recipe).items()
        for prefix, reason in _switched_off(recipe)
        if key == prefix or key.startswith(f"{prefix}.")
    ]


def changed_keys(recipe: Recipe) -> dict[str, object]:
    """The dotted keys whose value differs from the default, or that have no default, in the order of the tables."""
    defaults = DEFAULTS | {"run.output_dir": f"runs/{recipe.run.name}"}
    values = flatten(recipe.model_dump())
    return {key: value for key, value in values.items() if key not in defaults or value != defaults[key]}


def _parts(recipe: Recipe) -> Iterator[Conflict]:
    model = recipe.model
    whole = 'model.base = "llava-hf/llava-1.5-7b-hf"'
    if model.base and model.language_model:
        yield (
            "model.base model.language_model",
            "A model is either loaded or assembled from parts.",
            "Remove model.language_model to load, or model.base to assemble.",
        )
    elif not model.base and not (model.language_model and model.vision_tower):
        yield (
            "model.base model.language_model model.vision_tower",
            "The recipe does not name a whole model.",
            f"Set {whole}, or another; or model.language_model and model.vision_tower to assemble one.",
        )
    if model.base and model.family != "llava":
        yield (
            "model.base model.family",
            "The config of a whole model names its family; model.family is for a model assembled from parts.",
            "Remove model.family; or model.base, and name model.language_model and model.vision_tower.",
        )
    if model.language_model and not model.projector and not model.train_projector and model.train != "projector":
        yield (
            "model.train_projector model.projector",
            "An assembled model starts with a random projector, and this recipe would never train it in full.",
            "Set model.projector to a trained one, or model.train_projector = true"
            f"{' and model.lora.projector = false' if model.adapts_projector else ''}.",
        )


def _training(recipe: Recipe) -> Iterator[Conflict]:
    model, bits = recipe.model, recipe.model.quantization.bits
    if model.train == "projector" and not model.train_projector:
        yield (
            "model.train model.train_projector",
            '"projector" (stage 1) trains the projector and nothing else.',
            'Set model.train_projector = true, or model.train = "lora" or "full".',
        )
    if model.train == "full" and bits < 16:
        yield (
            "model.train model.quantization.bits",
            "Quantised weights are frozen: they have no gradient.",
            'Set model.quantization.bits = 16, or model.train = "lora".',
        )
    if model.train == "lora" and model.lora.variant == "pissa" and bits < 16:
        yield (
            "model.lora.variant model.quantization.bits",
            "PiSSA decomposes the weights themselves, which PEFT cannot do once they are quantised.",
            'Set model.quantization.bits = 16, or model.lora.variant = "olora" or "lora".',
        )
    if model.adapts_projector and model.train_projector:
        yield (
            "model.lora.projector model.train_projector",
            "The projector is either adapted or trained in full.",
            "Set model.train_projector = false to adapt it, or model.lora.projector = false to train it in full.",
        )
    if model.adapts_projector and model.lora.variant in ("pissa", "olora") and (model.projector or not model.base):
        yield (
            "model.lora.projector model.lora.variant model.projector model.language_model",
            "PiSSA and OLoRA start from changed weights, which peft computes again from those of the base when it loads "
            "the adapter, and this projector is not the base's.",
            'Set model.lora.variant = "lora", or model.lora.projector = false.',
        )
    if model.adapter and model.train != "lora":
        yield (
            "model.adapter model.train",
            'An adapter can be continued only where one is trained, with model.train = "lora".',
            'Set model.train = "lora"; or merge the adapter first (llava_accel.export --to merged) '
            "and name the result in model.base.",
        )
    if recipe.data.labels == "original" and model.template == "auto":
        yield (
            "data.labels model.template",
            "What LLaVA's own code learns depends on its template, and \"auto\" is the base's.",
            'Set data.labels = "answers", or name the template, such as model.template = "qwen_1_5".',
        )
    if recipe.data.reader and recipe.data.columns:
        yield (
            f"data.reader data.columns.{next(iter(recipe.data.columns))}",
            "Both say how a row is read.",
            "Let the reader return our names, and remove data.columns.",
        )
    if recipe.data.group_by_length and not recipe.data.shuffle:
        yield (
            "data.shuffle data.group_by_length",
            "Records either keep the order of their files, or are grouped by length.",
            "Set data.group_by_length = false to keep the order, or data.shuffle = true.",
        )
    if recipe.data.cache_features is True and model.train_vision:
        yield (
            "data.cache_features model.train_vision",
            "Features of a vision tower that is being trained are out of date after one step.",
            'Set data.cache_features = "auto" or false, or model.train_vision = false.',
        )


def _pairs(recipe: Recipe) -> Iterator[Conflict]:
    data, preference = recipe.data, recipe.preference
    if recipe.train.objective != "dpo":
        if recipe.eval.metric == "pair_accuracy":
            yield (
                "eval.metric train.objective",
                "Only pairs of answers have a pair_accuracy.",
                'Set eval.metric = "loss" or the name of a score, or train.objective = "dpo".',
            )
        return
    if data.answers == "weighted":
        yield (
            "train.objective data.answers",
            "A pair has one chosen and one rejected answer, and no others with weights.",
            'Set data.answers = "most_frequent", or train.objective = "answers".',
        )
    if data.labels == "original":
        yield (
            "train.objective data.labels",
            "Only the last answers of a pair are learned from.",
            'Set data.labels = "answers", or train.objective = "answers".',
        )
    if data.on_too_long == "drop_turns":
        yield (
            "train.objective data.on_too_long",
            "The last turns of a pair are what it is about, and cannot be dropped.",
            'Set data.on_too_long = "skip" or "error", or train.objective = "answers".',
        )
    if not (preference.loss_weight or preference.bco_weight):
        yield (
            "preference.loss_weight preference.bco_weight",
            "Nothing would be learned from the rejected answers.",
            'Set one of them above 0, or train.objective = "answers".',
        )
    if preference.loss == "robust" and not preference.label_smoothing:
        yield (
            "preference.loss preference.label_smoothing",
            '"robust" allows for a share of wrong labels, which is 0 here: it would be "sigmoid".',
            'Set preference.label_smoothing to that share, such as 0.1, or preference.loss = "sigmoid".',
        )


def _kernels(recipe: Recipe) -> Iterator[Conflict]:
    if recipe.model.compile and recipe.model.attention in ("flex_attention", "flash_attention_2"):
        yield (
            "model.compile model.attention",
            "Layers are compiled with PyTorch's own attention; flex_attention is compiled by itself.",
            'Set model.attention = "auto" or "sdpa", or model.compile = false.',
        )
    if recipe.model.compile and recipe.model.kernels == "liger":
        yield (
            "model.compile model.kernels",
            "torch.compile generates its own kernels for the whole layer.",
            'Set model.compile = false, or model.kernels = "native".',
        )
    if recipe.model.attention != "flash_attention_2":
        return
    if recipe.data.share_prefix:
        yield (
            "model.attention data.share_prefix",
            "A shared prefix needs a mask for each pair of positions, and flash_attention_2 takes none.",
            'Set model.attention = "auto" or "sdpa", or data.share_prefix = false.',
        )
    if recipe.run.precision == "fp32":
        yield (
            "model.attention run.precision",
            "flash_attention_2 computes in 16 bits only.",
            'Set model.attention = "auto" or "sdpa", or run.precision = "bf16" or "fp16".',
        )


def _evaluation(recipe: Recipe) -> Iterator[Conflict]:
    data = recipe.data
    if data.eval and data.eval_fraction:
        yield (
            "data.eval data.eval_fraction",
            "Evaluation data is either a file or a share of data.train.",
            "Remove data.eval, or set data.eval_fraction = 0.",
        )
    if data.eval or data.eval_fraction:
        return
    remedy = "Set data.eval to a file or data.eval_fraction to a share of data.train such as 0.02, or"
    if recipe.checkpoint.best and recipe.eval.metric != "loss":
        yield (
            "eval.metric checkpoint.best data.eval data.eval_fraction",
            "There is no evaluation data to choose the best checkpoint by.",
            f"{remedy} checkpoint.best = false.",
        )
    if recipe.eval.patience:
        yield (
            "eval.patience data.eval data.eval_fraction",
            "Patience counts evaluations, and there is no evaluation data.",
            f"{remedy} eval.patience = 0.",
        )


def _switched_off(recipe: Recipe) -> list[tuple[str, str]]:
    """Keys and tables that do nothing in this recipe, each with the reason."""
    model, data, optim, train = recipe.model, recipe.data, recipe.optim, recipe.train
    rate_is_replaced = model.train == "projector" and optim.learning_rate != optim.projector_learning_rate
    trains_projector = model.train_projector or model.adapts_projector
    is_uncached = data.cache_features is False or model.train_vision
    cases = (
        (model.train != "lora", "model.lora", f'model.train is "{model.train}", not "lora"'),
        (rate_is_replaced, "optim.learning_rate", 'model.train = "projector" uses optim.projector_learning_rate'),
        (model.quantization.bits != 4, "model.quantization.type", "model.quantization.bits is not 4"),
        (model.quantization.bits != 4, "model.quantization.double", "model.quantization.bits is not 4"),
        (not trains_projector, "optim.projector_learning_rate", "model.train_projector is false"),
        (not model.train_vision, "optim.vision_learning_rate", "model.train_vision is false"),
        (optim.optimizer == "sgd", "optim.betas", 'optim.optimizer is "sgd"'),
        (data.on_bad_record == "error", "data.max_bad", 'data.on_bad_record is "error"'),
        (is_uncached, "data.cache_max_gb", "vision features are not cached"),
        (train.objective != "dpo", "preference", 'train.objective is not "dpo"'),
        (
            recipe.preference.loss not in ("sigmoid", "robust"),
            "preference.label_smoothing",
            f"preference.loss is {toml_value(recipe.preference.loss)}",
        ),
        (train.on_nonfinite == "stop", "train.max_nonfinite", 'train.on_nonfinite is "stop"'),
        (train.max_steps > 0, "train.epochs", "train.max_steps decides when the run ends"),
        (not (data.eval or data.eval_fraction), "eval", "neither data.eval nor data.eval_fraction is set"),
    )
    return [(key, reason) for is_off, key, reason in cases if is_off]
