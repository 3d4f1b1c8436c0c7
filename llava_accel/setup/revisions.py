"""Finds the commit of each data set of the hub that a run reads: with it in the recipe, a repeated run reads the same."""

from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from llava_accel.recipe import Recipe, RecipeError, load_recipe
from llava_accel.recipe.inputs import Source
from llava_accel.sources import hub
from llava_accel.sources.named import EVAL_SPLITS

Sources = str | tuple[Source, ...]


def pin_revisions(recipe: Recipe, accelerator: Accelerator) -> Recipe:
    """The recipe with the commit of every data set of the hub that it names; a run that goes on keeps its commits.

    Every rank must call this.

    Raises:
        DataError: the hub has no such data set or revision.
    """
    resolved: list[dict[str, Sources]] = [{}]
    if accelerator.is_main_process:
        before = _commits_of_run(recipe)
        named: dict[str, tuple[Sources, tuple[str, ...]]] = {
            "train": (recipe.data.train, ("train",)), "eval": (recipe.data.eval, EVAL_SPLITS)
        }  # fmt: skip
        for key, (sources, splits) in named.items():
            if (pinned := _pinned(sources, splits, before)) != sources:
                resolved[0][key] = pinned
    changed = broadcast_object_list(resolved)[0]
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=changed)}) if changed else recipe


def _pinned(sources: Sources, splits: tuple[str, ...], before: dict[str, str]) -> Sources:
    listed = (Source(path=sources),) if isinstance(sources, str) and sources else sources
    pinned = tuple(_with_commit(each, splits, before) for each in listed if isinstance(each, Source))
    return sources if pinned == listed or all(not each.revision for each in pinned) else pinned


def _with_commit(source: Source, splits: tuple[str, ...], before: dict[str, str]) -> Source:
    if not hub.is_of_hub(source.path):
        return source
    asked = (source.split,) if source.split else splits
    commit = before.get(_key(source)) or hub.pinned(source.path, source.config, asked, source.revision)
    return source.model_copy(update={"revision": commit})


def _commits_of_run(recipe: Recipe) -> dict[str, str]:
    """The commits that the run in this folder has read, by the `_key` of each source as the user wrote it."""
    path = Path(recipe.run.output_dir) / "recipe.toml"
    if recipe.run.resume == "never" or not path.is_file():
        return {}
    try:
        data = load_recipe(path, warns=False).data
    except RecipeError:  # damaged: a checkpoint knows its data by content too
        return {}
    listed = [each for sources in (data.train, data.eval) if not isinstance(sources, str) for each in sources]
    return {_key(each.model_copy(update={"revision": ""})): each.revision for each in listed}


def _key(source: Source) -> str:
    """A text that tells sources apart. The revision is empty where the recipe asks for none."""
    return repr((source.path, source.config, source.split, source.revision))
