"""Columns of Arrow files, made of buffers: `pa.array` and `to_numpy` import pandas, which every start would wait for."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, DTypeLike


def of_numbers(values: ArrayLike, dtype: DTypeLike) -> pa.Array:
    """A column of numbers. `np.from_dlpack` reads it back."""
    numbers = np.ascontiguousarray(values, dtype)
    return pa.Array.from_buffers(pa.from_numpy_dtype(numbers.dtype), numbers.size, [None, pa.py_buffer(numbers)])


def of_bytes(values: Sequence[bytes], kind: pa.DataType) -> pa.Array:
    """A column of `kind`, which is large_binary or large_string."""
    offsets = np.cumsum([0, *map(len, values)], dtype=np.int64)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(values))])
