"""What is not tried where a package of the extra `kernels` is missing."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("triton") and find_spec("liger_kernel") else ["test_liger_kernels.py"]
