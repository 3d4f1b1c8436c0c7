"""The tables of a recipe that say how the run goes, and `Recipe`, which holds all nine."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, Strict, WithJsonSchema, field_validator

from llava_accel.recipe.inputs import (
    AtLeastOne,
    BelowOne,
    Count,
    DataTable,
    ModelTable,
    NotNegative,
    OwnFolder,
    OwnFunction,
    Positive,
    Seed,
    Table,
    Text,
    refused,
)

Metric = Literal[
    "vqa_accuracy", "exact_match", "multiple_choice", "token_f1", "anls", "relaxed_accuracy", "rouge_l", "bleu", "cider",
    "classification", "pope",
]  # fmt: skip
USUAL_METRICS: tuple[Metric, ...] = ("vqa_accuracy", "exact_match", "multiple_choice")
"""The metrics of eval.metrics = "auto"."""
_OF_THE_OBJECTIVE = ("loss", "pair_accuracy")
"""Values of eval.metric for which no answer has to be generated."""
Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab"]


class RunTable(Table):
    """The run as a whole."""

    name: str
    """Name of the run and of its folder: letters, digits, dot, dash and underscore."""
    output_dir: Annotated[OwnFolder, Field(validate_default=True, json_schema_extra={"default": "runs/<name>"})] = ""
    """The run folder; empty = runs/<name>."""
    seed: Seed = 42
    """Seed of the order, the dropout and the new weights."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """"auto" = bf16 where the GPU has it, else fp16; fp32 on a CPU. Trained weights are always kept in fp32. A step whose
    gradient is larger than fp16 holds is computed once more, at a lower loss scale."""
    deterministic: bool = False
    """Use only kernels that add in a fixed order, so that a run on a GPU can be repeated bit for bit on that GPU; slower.
    A CPU does so anyway. Without it, a repeated run has the same order and data, but its bits may differ."""
    matmul: Literal["auto", "native"] = "auto"
    """fp32 products on a CPU: "auto" = oneDNN's where a probe finds them exact and layers are wide enough to gain, or
    "native"."""
    resume: Text = "auto"
    """"auto" = the newest complete checkpoint of this run, "never", or a checkpoint folder."""

    @field_validator("name")
    @classmethod
    def _is_a_folder_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            raise refused(
                "The name is also the run's folder: at most 100 letters, digits, dots, dashes and "
                "underscores, the first a letter or a digit.",
                "Choose another name. To put the folder in another place, set run.output_dir.",
            )
        return name

    @field_validator("output_dir")
    @classmethod
    def _follows_the_name(cls, output_dir: str, info: Any) -> str:
        return output_dir or f"runs/{info.data.get('name', '')}"


class OptimTable(Table):
    """Optimizer and schedule; rates are peak values, and steps are optimizer steps."""

    learning_rate: NotNegative = 2e-4
    """Peak rate of the adapter, or of the language model with train = "full"."""
    projector_learning_rate: Annotated[
        NotNegative,
        WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0}, {"enum": ["null", ""]}], "default": 2e-5}),
    ] = 2e-5
    """Peak rate of the projector; "null" = learning_rate, and the resolved recipe holds the number."""
    vision_learning_rate: NotNegative = 2e-6
    """Peak rate of the vision tower, with model.train_vision."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "sgd"] | OwnFunction = "adamw"
    """The 8-bit ones keep their state in 8 bits; the paged one can spill it to main memory. "my_optim.py:build" is a
    function of yours: (parameter groups, this table) -> a torch.optim.Optimizer; not with ZeRO or FSDP2."""
    betas: Annotated[tuple[BelowOne, BelowOne], Strict(False)] = (0.9, 0.999)
    """Decay of Adam's running means of the gradient and of its square."""
    weight_decay: NotNegative = 0.0
    """Decoupled decay of the weights that decay names."""
    decay: Literal["weights", "original"] = "weights"
    """What decays: weight matrices only, so neither biases nor norms; or, as in LLaVA's own trainer ("original"), also
    image_newline, class and position embeddings, and the norms of language models other than Llama."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls after the warm-up: to 0 on the last step, or not at all."""
    warmup_fraction: BelowOne = 0.03
    """Share of the steps in which the rate rises from 0."""
    max_grad_norm: NotNegative = 1.0
    """Clip the norm of the whole gradient to this; 0 = no clipping, as LLaVA's published runs."""

    @field_validator("projector_learning_rate", mode="before")
    @classmethod
    def _null_is_the_learning_rate(cls, rate: Any, info: Any) -> Any:
        # TOML has no null. Where learning_rate itself is wrong, that is reported: any number will do here.
        return info.data.get("learning_rate", 0.0) if rate in (None, "", "null") else rate


class TrainTable(Table):
    """Length and batch size of the run; the global batch is per_device_batch_size x accumulation_steps x ranks."""

    epochs: AtLeastOne = 1
    """Passes over the data."""
    max_steps: Count = 0
    """Optimizer steps; 0 = by epochs."""
    per_device_batch_size: AtLeastOne = 16
    """Examples in a micro-batch on one rank."""
    accumulation_steps: AtLeastOne = 1
    """Micro-batches in a window, that is in one optimizer step, on one rank."""
    objective: Literal["answers", "dpo"] | OwnFunction = "answers"
    """What is learned: the answers; which of two answers is preferred ("dpo", see [preference]); or "my_loss.py:Name", a
    class of yours that inherits from llava_accel.model.objective.Objective."""
    loss: Literal["tokens", "micro_batch_mean"] = "tokens"
    """A step's loss is the mean over all target tokens (or pairs) of its global batch, however that is split; or the mean of
    the means of its micro-batches, as in LLaVA's own training, where a micro-batch without a target does not count."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite stops the run, or makes no update and is reported."""
    max_nonfinite: Count = 10
    """How many times "skip" may do so before the run stops after all."""
    spike_factor: NotNegative = 0.0
    """Report a step whose loss exceeds this factor times the running median; 0 = never, else above 1."""

    @field_validator("spike_factor")
    @classmethod
    def _is_off_or_above_one(cls, factor: float) -> float:
        if 0 < factor <= 1:
            remedy = "Use 0 for never, or a factor above 1, such as 3.0."
            raise refused("A factor of 1 or less would report every other step.", remedy)
        return factor


class PreferenceTable(Table):
    """Learning from pairs of answers, with train.objective = "dpo". A step's loss is the mean over pairs of loss_weight x
    loss + bco_weight x BCO, plus sft_weight x the cross-entropy of the chosen answers, a mean over their tokens."""

    beta: Positive = 0.1
    """How strongly the model is held to what it was before training; with ipo the paper's tau."""
    loss: Literal["sigmoid", "hinge", "ipo", "robust"] = "sigmoid"
    """DPO's own; SLiC's hinge; IPO, on log-probabilities per token; DPO that allows for wrong labels (label_smoothing)."""
    loss_weight: NotNegative = 1.0
    """0 leaves it out. MPO is loss_weight = 0.8, bco_weight = 0.2, sft_weight = 1.0."""
    bco_weight: NotNegative = 0.0
    """Weight of BCO, which makes the chosen answer likelier and the rejected one less likely, each on its own."""
    sft_weight: NotNegative = 0.0
    """Weight of learning the chosen answer itself; others call it rpo_alpha."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of the pairs whose labels may be the wrong way round, for sigmoid (conservative DPO) and robust."""


class EvalTable(Table):
    """Evaluation during the run; it needs data.eval or data.eval_fraction."""

    at_start: bool | Count = True
    """Score the base before the first step, so that later scores can be compared with it: true = on at most 500 of the
    examples, a number = on at most that many, false = not at all."""
    every: Count = 0
    """Steps between evaluations; 0 = at the end of each epoch."""
    metrics: Literal["auto"] | list[Metric | OwnFunction] = "auto"
    """How answers are scored: "auto" = VQA accuracy, exact match and, where records have "choices", multiple_choice; or a
    list. anls is for documents, relaxed_accuracy for charts, rouge_l, bleu and cider for captions, classification is the
    mean F1 of classes, pope that of yes and no.
    "my_scores.py:name" is a function of yours: (prediction, references) -> a number, higher is better."""
    metric: Literal["loss", "pair_accuracy"] | Metric | OwnFunction = "loss"
    """Chooses the best checkpoint, and is what patience watches; multiple_choice needs records with "choices", and
    pair_accuracy (the share of pairs whose chosen answer has gained more) needs train.objective = "dpo"."""
    max_new_tokens: AtLeastOne = 16
    """Longest generated answer, in tokens."""
    limit: Count = 0
    """Examples to evaluate; 0 = all."""
    blind_limit: Count = 500
    """Examples also answered with the image blanked, to see how much of the score needs it; 0 = none."""
    train_limit: Count = 200
    """Training examples answered at the end, of which the report shows those with the highest loss; 0 = none."""
    patience: Count = 0
    """Evaluations without improvement before the run stops; 0 = never."""

    @property
    def measured(self) -> tuple[str, ...]:
        """Names of all scores that an evaluation measures."""
        named = USUAL_METRICS if self.metrics == "auto" else self.metrics
        return tuple(dict.fromkeys([*named, *([] if self.metric in _OF_THE_OBJECTIVE else [self.metric])]))


class CheckpointTable(Table):
    """What is saved during the run."""

    every: Count = 0
    """Steps between checkpoints; 0 = at the end of each epoch."""
    keep: AtLeastOne = 2
    """Number of newest checkpoints that are kept, besides the best."""
    best: bool = True
    """Also keep the checkpoint with the best eval.metric; needs evaluation data."""
    background: Literal["auto"] | bool = "auto"
    """Write checkpoints while the next steps run, which takes a copy in main memory; "auto" = large ones, if it fits."""
    verify: bool = True
    """Load the finished export in a process with transformers and peft alone, and compare its outputs. This loads the
    base once more."""


class LogTable(Table):
    """What is reported during the run."""

    every: AtLeastOne = 1
    """Steps between log lines."""
    trackers: Annotated[tuple[Tracker, ...], Strict(False)] = ()
    """Trackers that also receive the log lines, under Accelerate's names; each needs its own package."""


class Recipe(Table):
    """One run of llava_accel."""

    run: RunTable
    model: ModelTable = ModelTable()
    data: DataTable
    optim: OptimTable = OptimTable()
    train: TrainTable = TrainTable()
    preference: PreferenceTable = PreferenceTable()
    eval: EvalTable = EvalTable()
    checkpoint: CheckpointTable = CheckpointTable()
    log: LogTable = LogTable()

    @property
    def loss_unit(self) -> str:
        """The unit of this run's loss, in words."""
        name = self.train.objective
        return {"answers": "nats a target", "dpo": "a mean over pairs"}.get(name, f"that of {name}")
