"""The tables of a recipe that say what goes in: [model] with its sub-tables, and [data]."""

import difflib
import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Strict,
    Tag,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

_LONGEST_NAME = 100  # characters of a name that is shown
_OTHER_TEMPLATE_NAMES = {
    "vicuna_v1": "v1", "chatml_direct": "chatml", "qwen_2": "qwen_1_5", "qwen_2_5": "qwen_1_5",
}  # fmt: skip
_MOST_READERS = 16
_MOST_WORKERS = 4  # of "auto"
_MOST = 10**9  # no run needs more: a larger number is a typing error, and would overflow or fill the memory
Count = Annotated[int, Field(ge=0, le=_MOST)]
AtLeastOne = Annotated[int, Field(ge=1, le=_MOST)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, le=1e6)]
Share = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]
OwnFunction = Annotated[str, Field(pattern=r"^.+\.py:[A-Za-z_][A-Za-z0-9_]*$")]
"""A function in a file: "my_scores.py:anls_de"."""


def refused(problem: str, remedy: str) -> PydanticCustomError:
    """The error for a value; `errors.problems_of` reports it in these words."""
    return PydanticCustomError("refused", "{problem}", {"problem": problem, "remedy": remedy})


class Table(BaseModel):
    """One table of a recipe: the named keys and no others, no change after loading, no guessing of types."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @field_validator("*")
    @classmethod
    def _has_no_nul(cls, value: Any) -> Any:
        if isinstance(value, str) and "\0" in value:
            raise refused("A path or a name cannot hold the character NUL.", "Remove it.")
        return value


def _has_no_tilde(folder: str) -> str:
    if (home := os.path.expanduser(folder)) != folder:
        raise refused("Only a shell reads ~ as the home folder: a folder of that name would be made.", f"Write {home}.")
    return folder


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        remedy = "Correct the pattern; a literal dot is written \\\\. in TOML."
        raise refused(f"Not a regular expression: {error}.", remedy) from error
    return pattern


def _one_name(template: str) -> str:
    return _OTHER_TEMPLATE_NAMES.get(template, template)


OwnFolder = Annotated[str, AfterValidator(_has_no_tilde)]
"""A folder that is made if it does not exist."""
Pattern = Annotated[Text, AfterValidator(_compiles)]
Patterns = Annotated[tuple[Pattern, ...], Strict(False), Field(min_length=1)]


class QuantizationTable(Table):
    """How the frozen language model is stored. Vision tower, projector and lm_head are never quantised."""

    bits: Literal[16, 8, 4] = 16
    """Bits a weight: 4 is QLoRA, 16 is not quantised."""
    type: Literal["nf4", "fp4"] = "nf4"
    """The 4-bit code; nf4 fits weights that are normally distributed (QLoRA)."""
    double: bool = True
    """Quantise the 4-bit scales as well: saves about 0.4 bits a weight."""


class LoraTable(Table):
    """The adapter of train = "lora"."""

    rank: Annotated[int, Field(ge=1, le=65536)] = 128
    """Width of the two low-rank factors; 128 as LLaVA-1.5."""
    alpha: AtLeastOne = 256
    """Scale of the update: alpha / rank (alpha / sqrt(rank) with rslora)."""
    dropout: BelowOne = 0.05
    """Share of a layer's input entries that the adapter does not see in a step."""
    bias: Literal["none", "lora_only"] = "none"
    """Also train the biases of the layers that carry an adapter ("lora_only")."""
    targets: Literal["auto"] | Patterns = "auto"
    """"auto" = every linear layer of the language model except lm_head; or a list of regular expressions that a
    layer's whole path must match (q_proj alone matches nothing; a part of a path would match the vision tower's too)."""
    variant: Literal["lora", "rslora", "dora", "pissa", "olora"] = "lora"
    """How the adapter is scaled (rslora), decomposed (dora) or started from the weights (pissa, olora)."""
    projector: bool = False
    """Adapt the projector too, at optim.projector_learning_rate, in place of training it in full: train_projector is then
    false. All that is trained is then in the adapter, so that vLLM can serve it."""


class ModelTable(Table):
    """Which model, and which part of it is trained."""

    base: str = ""
    """Folder or hub id of a LLaVA model, in the Hugging Face or the original LLaVA layout. This, or
    language_model together with vision_tower."""
    language_model: str = ""
    """Folder or hub id of a language model, to assemble a LLaVA model from parts."""
    vision_tower: str = ""
    """Folder or hub id of a CLIP model: a part to assemble, or the tower used in place of the base's."""
    family: Literal["llava", "llava_next", "llava_onevision"] = "llava"
    """The model to assemble from parts, under transformers' names: a LLaVA-1.5, or a LLaVA-NeXT or OneVision, which cut
    images into tiles."""
    projector: str = ""
    """A trained projector: a file (mm_projector.bin or .safetensors), a folder with one, or a run of stage 1; empty = the
    base's, or a random one for parts."""
    train: Literal["projector", "lora", "full"] = "lora"
    """What learns: the projector alone (stage 1), an adapter, or all weights of the language model."""
    train_projector: bool = True
    """Train the projector too, in full, with "lora" and "full"; as LLaVA."""
    train_vision: bool = False
    """Train the vision tower too, in full, at optim.vision_learning_rate; possible with any `train`."""
    adapter: str = ""
    """The adapter to start from: a run, a checkpoint, an export, or another folder of PEFT's or original LLaVA's."""
    template: Annotated[
        Literal[
            "v1", "vicuna_v1", "llava_v1", "plain", "llava_llama_2", "llava_llama_3", "mistral_instruct",
            "chatml", "chatml_direct", "qwen_1_5", "qwen_2", "qwen_2_5", "auto",
        ],
        AfterValidator(_one_name),
    ] = "v1"  # fmt: skip
    """Conversation template under LLaVA's name, where vicuna_v1 is v1, chatml_direct chatml, qwen_2 and qwen_2_5 qwen_1_5;
    "auto" = the processor's own chat template."""
    added_tokens: Annotated[tuple[Text, ...], Strict(False)] = ()
    """Special tokens of the base that texts may hold, such as ["<box>", "<loc_*>"], where * is any characters; all others
    are spelled out."""
    gradient_checkpointing: bool | AtLeastOne = False
    """Recompute activations in the backward pass; an integer k does so in every k-th layer only."""
    attention: Literal["auto", "sdpa", "flash_attention_2", "flex_attention", "eager"] = "auto"
    """The attention kernel, under transformers' names."""
    tower_batch: Count = 0
    """Squares (tiles) that run through the vision tower at once, which bounds its memory and changes no number; 0 = all of a
    micro-batch. A trained tower that ranks share (ZeRO-3, FSDP2) takes all."""
    compile: bool = False
    """Train the language model's layers, all but the last, through torch.compile: same numbers, fewer passes over memory.
    It takes a minute or more when a run starts, and needs a compiler; not with ZeRO-3 or FSDP2."""
    kernels: Literal["native", "liger"] = "native"
    """"liger" = norms, rotary positions and SwiGLU of the language model by liger-kernel, on a GPU; it is installed with
    pip install "llava-accel[kernels]"."""
    quantization: QuantizationTable = QuantizationTable()
    lora: LoraTable = LoraTable()

    @model_validator(mode="before")
    @classmethod
    def _adapted_is_not_trained_in_full(cls, table: Any) -> Any:
        # Only the default gives way: train_projector = true in the recipe contradicts it, as rules.py says.
        lora = table.get("lora") if isinstance(table, Mapping) else None
        adapts = isinstance(lora, Mapping) and lora.get("projector") is True and table.get("train", "lora") == "lora"
        return {"train_projector": False, **table} if adapts else table

    @property
    def named_base(self) -> str:
        """The base as the recipe names it; for a model made from parts, the language model."""
        return self.base or self.language_model

    @property
    def adapts_projector(self) -> bool:
        """Whether the adapter has LoRA layers on the projector."""
        return self.train == "lora" and self.lora.projector


class Source(Table):
    """One source of data.train or data.eval, when it is a list."""

    path: Text
    """A file, a folder, a pattern such as "data/*.parquet", or a data set of the Hugging Face hub (org/name)."""
    images: str = ""
    """Folder that the image names of this source are relative to; empty = data.images."""
    weight: Positive = 1.0
    """Passes over this source in an epoch: 1 = each record once, 2 = twice, 0.5 = half of them."""
    limit: Count = 0
    """Use at most this many of its records, spread evenly over it; 0 = all."""
    config: str = ""
    """Configuration of a data set of the hub; empty = the default one."""
    split: str = ""
    """Split of a data set; empty = "train", and for data.eval "validation" or else "test"."""
    revision: str = ""
    """Commit, tag or branch of a data set of the hub; the resolved recipe holds the commit."""


def _kind_of_sources(value: Any) -> str | None:
    if isinstance(value, str):
        return "path"
    return "sources" if isinstance(value, list | tuple) else None


_SOURCES = Discriminator(
    _kind_of_sources,
    custom_error_type="train_type",
    custom_error_message="a file, a folder, or a list of {path, images, weight}",
)
_Listed = Annotated[Annotated[tuple[Source, ...], Strict(False), Field(min_length=1)], Tag("sources")]
Sources = Annotated[Annotated[Text, Tag("path")] | _Listed, _SOURCES]
OptionalSources = Annotated[Annotated[str, Tag("path")] | _Listed, _SOURCES]
ColumnName = Literal[
    "id", "image", "conversations", "messages", "system", "question", "answer", "answers", "choices", "caption", "text",
    "texts", "prompt", "completion", "chosen", "rejected", "response", "query", "history", "instruction", "input", "output",
    "question_type", "answer_type",
]  # fmt: skip
"""Fields of a record whose columns data.columns may name."""


class DataTable(Table):
    """The records, and how they become examples, rows and batches."""

    train: Sources
    """JSON, JSON lines, Parquet, Arrow, WebDataset (tar) or a data set of the hub: a file, a folder, a pattern, org/name,
    or a list of {path, images, weight}."""
    images: str = ""
    """Folder that image names are relative to; a name may not leave it. Empty = the folder of each file."""
    eval: OptionalSources = ""
    """Evaluation data, named as in train; not together with eval_fraction."""
    eval_fraction: BelowOne = 0.0
    """Share of train held out for evaluation, split by image so that no image is on both sides."""
    max_length: AtLeastOne = 2048
    """Longest example, in tokens, image tokens included: 576 an image with LLaVA-1.5, up to 2,928 with LLaVA-NeXT, and 8,765
    or so with OneVision."""
    on_too_long: Literal["error", "drop_turns", "skip"] = "error"
    """A longer example stops the run, loses whole turns at its end, or is left out; the last two are counted."""
    on_bad_record: Literal["error", "skip"] = "error"
    """A record that cannot be used stops the run; or is left out, counted, and listed in the run folder."""
    max_bad: Share = 0.001
    """Share of the records that "skip" may leave out before the run stops after all."""
    image_aspect: Literal["auto", "pad", "crop", "stretch"] = "auto"
    """How an image becomes square: padded with the mean colour, cropped, or stretched. "auto" = as the base: LLaVA-1.5 pads,
    LLaVA-NeXT and OneVision cut it into tiles, which the other values turn off."""
    exif: Literal["ignore", "apply"] = "ignore"
    """Read images as they are stored, as LLaVA does, or turn them as their EXIF says, as most programs show them."""
    columns: dict[ColumnName, Text] = {}
    """Names of your columns where they differ from ours: {image = "photo", question = "q", answer = "label"}; a dot leads
    into a nested one."""
    reader: Literal[""] | OwnFunction = ""
    """"my_data.py:read", a function of yours: it takes a row of a file as it is, a dict, and returns a row in a form that
    is known here, or None to leave it out. What it returns must depend on the row alone."""
    missing_image_mark: Literal["error", "start"] = "error"
    """A record that names images, but has no `<image>` in its texts, cannot be used ("error"); or the images come before its
    first question ("start")."""
    image_placement: Literal["auto", "start", "start_if_single", "in_place"] = "auto"
    """Move the images to the start of their turn, as LLaVA-1.5 does, or an image that is the only one of its turn, as
    LLaVA-NeXT and OneVision do, or leave them where the text has them; "auto" = as the base's own code does."""
    answers: Literal["most_frequent", "weighted"] = "most_frequent"
    """Learn each record's last turn as it is; or, where a record has `answers`, learn each of these instead, weighted
    by the share of the annotators who gave it."""
    labels: Literal["answers", "original"] = "answers"
    """Learn each answer and the token that ends it; or what LLaVA's own code learns. With the templates llava_llama_3 and
    qwen_1_5 these are special tokens and the headers of answers too, and with qwen_1_5 line breaks. Special tokens and
    a template's words then count in texts as well, and a record from which that code learns nothing is refused."""
    share_prefix: bool = False
    """Questions on one image, and answers to one question, compute their common prefix once: same gradient, less work."""
    shuffle: bool = True
    """Draw a new order of the records for each epoch; false = keep that of the files, which needs data.group_by_length =
    false."""
    group_by_length: bool = True
    """Fill a batch with examples of nearly equal length: less padding."""
    cache_features: Literal["auto"] | bool = "auto"
    """Keep the frozen vision tower's features on disk; "auto" does so if they fit there."""
    cache_dir: OwnFolder = ""
    """Folder for features and for indexes of the data; empty = a folder of the user's cache."""
    cache_max_gb: Annotated[float, Field(ge=0, le=1e9)] = 50.0
    """Limit on the disk space of the features, in GB."""
    workers: Literal["auto"] | Annotated[int, Field(ge=0, le=1024)] = "auto"
    """Processes that load and decode, on each rank: "auto" = one per core, at most 4; 0 = in the training process."""

    @field_validator("columns", mode="before")
    @classmethod
    def _names_columns(cls, value: Any) -> Any:
        known = get_args(ColumnName)
        if not isinstance(value, Mapping):
            raise refused("Expected a table: our name of a field = your column.", 'Write it as {image = "photo"}.')
        for name, column in value.items():
            if name not in known:
                similar = difflib.get_close_matches(str(name)[:_LONGEST_NAME], known, n=1)
                problem = f"There is no field {str(name)[:_LONGEST_NAME]!r}; the fields are {', '.join(known)}."
                hint = f"Did you mean {similar[0]}? The key is our name, the value your column." if similar else ""
                raise refused(problem, hint or "Write our name of the field as the key, and your column as its value.")
            if not isinstance(column, str) or not column or "\0" in column:
                raise refused(f"The column of {name} is not a text.", f'Write the column\'s name: {{{name} = "..."}}.')
        return value

    @property
    def num_workers(self) -> int:
        """`workers` as a number, on this machine."""
        if self.workers != "auto":
            return self.workers
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # on this machine; the launcher sets it
        return min(_MOST_WORKERS, _num_cores() // ranks)

    @property
    def num_readers(self) -> int:
        """Processes that read all data through while everything else waits: one per core, at most 16; 0 if `workers` is."""
        return min(_MOST_READERS, _num_cores()) if self.workers else 0


def _num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
