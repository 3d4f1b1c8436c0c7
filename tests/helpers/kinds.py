"""Whether every kind of run is made: LLAVA_ACCEL_ALL_KINDS=1. Else every two of their properties come together once."""

import os

ALL_KINDS = bool(os.environ.get("LLAVA_ACCEL_ALL_KINDS"))
