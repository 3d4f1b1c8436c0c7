"""The windows of a run: this rank's micro-batches of every step, decoded ahead."""

from collections.abc import Callable, Iterator

from llava_accel.data.loader import Loaded
from llava_accel.data.sampler import Order, Window, windows
from llava_accel.runtime.context import RunContext
from llava_accel.setup.datasets import Part
from llava_accel.setup.micro_batches import load
from llava_accel.setup.state import TrainState


def train_windows(
    run: RunContext,
    part: Part,
    order: Order,
    state: TrainState,
    enter: Callable[[str], None],
    is_asked: Callable[[], bool],
) -> Iterator[list[Loaded]]:
    """This rank's micro-batches of every step from the position in `state` to the last one.

    Args:
        enter: Told each phase of loading, for the clock of the run.
        is_asked: Whether the process has been asked to end. Then the last window is empty.
    """
    return load(run, part, own_windows(run, part, order, state.step, state.num_steps), enter, is_asked)


def own_windows(run: RunContext, part: Part, order: Order, first: int, last: int) -> Iterator[Window]:
    """Rows of the corpus for this rank's micro-batches of the steps in [first, last)."""
    rank, ranks, train = run.accelerator.process_index, run.accelerator.num_processes, run.recipe.train
    # If each micro-batch has its own mean, putting examples of one length together would change their weights.
    keeps_order = train.loss != "tokens" and not order.group_by_length
    sizes = {"per_device_batch_size": train.per_device_batch_size, "num_ranks": ranks}
    steps = windows(order, first, last, keeps_order=keeps_order, **sizes)
    return ([part.rows[micro_batch].tolist() for micro_batch in step[rank]] for step in steps)
