"""The contents of the folders that a run writes, and which bytes of them each rank writes.

When a model is trained in full, each rank writes its own share of every weight and moment, and nothing is gathered. An
adapter and its moments are small: they are gathered, and the main process writes them.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from llava_accel.checkpoint import progress
from llava_accel.checkpoint.model_card import describe
from llava_accel.model.build import LoadedModel
from llava_accel.model.processing import Processing
from llava_accel.model.save import adapter_files, is_saved, save_frame, save_model_config
from llava_accel.recipe import dump_recipe
from llava_accel.runtime.context import Prepared, RunContext
from llava_accel.runtime.engines import gathered_optimizer_state, gathered_weights, optimizer_shares, weight_shares
from llava_accel.storage.tensor_files import Chunk, Files, Share, chunks, divided, into_files, make_files

_FILE_BYTES = 50_000_000_000  # the hub takes no larger files


@dataclass(frozen=True, slots=True)
class Taken:
    """The weights and moments of one step that this rank writes."""

    weights: dict[str, Share] | dict[str, Tensor]
    """Either every rank has its shares, or the main process has whole tensors."""
    moments: list[tuple[str, str, Share]]


class Contents:
    """The contents of one run's checkpoints and exports.

    Args:
        prepared: Holds the weights and the optimizer's state to write.
        loaded: The model as it was loaded, for names and fingerprint.
    """

    def __init__(self, run: RunContext, prepared: Prepared, loaded: LoadedModel, processing: Processing) -> None:
        self._run, self._prepared, self._loaded, self._processing = run, prepared, loaded, processing
        self.is_divided = run.recipe.model.train == "full"
        """Whether every rank writes, and not only the main process."""

    def take(self, *, with_moments: bool) -> Taken:
        """The tensors to write now. Every rank must call it. They are not copies: the next step changes them."""
        accelerator, model, optimizer = self._run.accelerator, self._prepared.model, self._prepared.optimizer
        if self.is_divided:
            shares = optimizer_shares(accelerator, model, optimizer) if with_moments else ()
            return Taken(weight_shares(accelerator, model), list(shares))
        weights = gathered_weights(accelerator, model, is_saved(self._prepared.objective, self._run.recipe))
        moments = gathered_optimizer_state(accelerator, model, optimizer) if with_moments else ()
        return Taken(weights, [(name, key, divided(value)) for name, key, value in moments])

    def lay_out(self, folder: Path, taken: Taken, step: int) -> dict[str, str]:
        """Write all but the tensors, and create the files for those. Call it on the main process only.

        Args:
            folder: That of a checkpoint or an export.
            step: That of the weights.

        Returns:
            The `names` that `chunks` needs.
        """
        recipe, objective = self._run.recipe, self._prepared.objective
        save_frame(folder, objective, self._loaded, self._processing, recipe)
        (folder / "recipe.toml").write_text(dump_recipe(recipe), encoding="utf-8")
        describe(folder, Path(recipe.run.output_dir), recipe, step)
        names = save_model_config(folder, objective, taken.weights) if self.is_divided else {}
        files, index = self._files(taken, names)
        if index is not None:
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        make_files(folder, files)
        return names

    def chunks(self, taken: Taken, names: dict[str, str]) -> list[Chunk]:
        """The parts of those files that this rank writes.

        Args:
            names: What `lay_out` returned on the main process.
        """
        is_main = self._run.accelerator.is_main_process
        if not self.is_divided and not is_main:
            return []
        return list(chunks(self._files(taken, names)[0], with_headers=is_main))

    def _files(self, taken: Taken, names: dict[str, str]) -> tuple[Files, dict[str, object] | None]:
        index = None
        if self.is_divided:
            shares = {stored: taken.weights[name] for stored, name in names.items()}
            files, index = into_files(shares, "model{suffix}.safetensors", _FILE_BYTES)  # pyright: ignore[reportArgumentType]
        else:
            by_file = adapter_files(self._prepared.objective, taken.weights)  # pyright: ignore[reportArgumentType]
            files = {file: {name: divided(tensor) for name, tensor in state.items()} for file, state in by_file.items()}
        moments = progress.optimizer_files(taken.moments)
        return files | {f"engine/{file}": tensors for file, tensors in moments.items()}, index
