"""What ranks send to each other, counted where torch hands it to the communication library."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch.distributed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Share of a tensor that a rank sends, in the algorithm that sends least: (N - 1) / N of it, twice to sum on all ranks.
_TIMES = {"allreduce": 2, "allgather": 1, "reducescatter": 1, "broadcast": 1, "reduce": 1, "alltoall": 1}
_WHOLE_IS_SECOND = ("reducescatter", "alltoall")
"""Of these the second argument is what is cut up; the first is what a rank receives."""


class Traffic(TorchDispatchMode):
    """While it is entered, the bytes that this rank sends in collectives, by kind.

    It slows down every operation: measure time without it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()
        """Bytes by kind: "allreduce", "allgather", "reducescatter", "broadcast", ..."""

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count(func.namespace, func.overloadpacket.__name__.replace("_", ""), args)
        return func(*args, **(kwargs or {}))

    def _count(self, namespace: str, name: str, args: Sequence[Any]) -> None:
        kind = next((kind for kind in _TIMES if name.startswith(kind)), None)
        if kind is None:  # barriers, and waiting
            return
        ranks = torch.distributed.get_world_size()
        if namespace == "c10d":
            whole = _bytes(args[1] if kind in _WHOLE_IS_SECOND else args[0])
        else:  # these take what a rank has, and return what it gets
            whole = _bytes(args[0]) * (ranks if kind == "allgather" else 1)
        self.sent[kind] += _TIMES[kind] * whole * (ranks - 1) // ranks


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0
