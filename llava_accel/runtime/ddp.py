"""DDP: what it holds. See backend.py."""

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def bucket_bytes(model: nn.Module) -> int:
    """Of the buckets in which gradients are summed, which no Python object shows; 0 for other models."""
    if not isinstance(model, DistributedDataParallel):
        return 0
    sizes = str(model._get_ddp_logging_data()["bucket_sizes"])
    return sum(int(size) for size in sizes.split(","))
