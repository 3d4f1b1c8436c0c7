"""A trained model that answers single questions, for notebooks and scripts: `load_trained` and `answer`."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from llava_accel.inference import origin
from llava_accel.inference.dialogue import Dialogue

ImageSource = str | Path | Image.Image
"""A file, or an image in memory."""
_OF_PNG = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
"""Modes of Pillow that a PNG holds as they are."""


class Answerer:
    """A model that answers questions, each without the ones before."""

    def __init__(self, dialogue: Dialogue, notes: Sequence[str]) -> None:
        self._dialogue = dialogue
        self.notes = list(notes)
        """Which weights these are, and what is odd about them."""

    def answer(self, image: ImageSource | Sequence[ImageSource] | None, question: str) -> str:
        """The model's answer: the likeliest token at each place.

        Args:
            image: A file, an image of PIL's, several of these, or None. They come before the question.

        Raises:
            DataError: there is no such image, or it cannot be read.
            UserError: the question does not fit into the model.
        """
        images = [] if image is None else [image] if isinstance(image, ImageSource) else image
        with ExitStack() as stack:
            stack.callback(self._dialogue.reset)
            for each in images:
                if isinstance(each, Image.Image):
                    file = Path(stack.enter_context(TemporaryDirectory())) / "image.png"
                    wide = "I;16" if each.mode.startswith("I") else "RGB"
                    shown = each if each.mode in _OF_PNG else each.convert(wide)
                    shown.save(file, exif=each.getexif())
                    each = file
                self._dialogue.show(Path(each))
            return self._dialogue.ask(question)


def load_trained(
    folder: Path | str, *, base: str = "", template: str = "", bits: int = 0, max_new_tokens: int = 512
) -> Answerer:
    """Load what `llava-accel chat --adapter FOLDER` loads.

    Args:
        folder: A run, a checkpoint, an export, or another folder or hub id of weights.
        base: Folder or hub id of the base, in place of the one in the folder's recipe. Adapters made elsewhere need it.
        template: Conversation template, in place of the recipe's.
        bits: 4, 8 or 16 in place of the recipe's quantisation; 0 leaves it.
        max_new_tokens: Longest answer.

    Raises:
        UserError: the folder holds no weights, or they are damaged, or do not belong to the base.
    """
    trained = origin.find_trained(str(folder), base=base, template=template, bits=bits)
    loaded = origin.load_here(trained)
    return Answerer(Dialogue(loaded, trained.recipe, max_new_tokens), [origin.describe(trained), *loaded.notes])


def answer(model: Answerer | Path | str, image: ImageSource | Sequence[ImageSource] | None, question: str) -> str:
    """A model's answer to a question.

    Args:
        model: From `load_trained`; or a folder, which is loaded for this question alone.
        image: See `Answerer.answer`.

    Raises:
        UserError: see `load_trained` and `Answerer.answer`.
    """
    return (model if isinstance(model, Answerer) else load_trained(model)).answer(image, question)
