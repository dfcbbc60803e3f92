"""The compiled library: loads it, and says what it can do here. Needs neither vLLM nor a GPU."""

from importlib.util import find_spec

import torch

# Found by name, because an editable install keeps the library away from this file.
_library = find_spec("vllm_int8kv._C")
if _library is None or _library.origin is None:
    raise ImportError("vllm_int8kv._C is missing: install vllm-int8kv with pip, or run `make setup` in a checkout")
torch.ops.load_library(_library.origin)

MIN_COMPUTE_CAPABILITY = (7, 5)
"""Of NVIDIA GPUs that the CUDA kernels are made for."""


def cpu_isas() -> list[str]:
    """The CPU kernel paths this machine can run, slowest first: scalar, avx2, avx2_vnni, avx512, avx512_vnni."""
    return torch.ops.int8kv.cpu_isas().split(",")


def cpu_isa() -> str:
    """The CPU kernel path in use; the fastest of `cpu_isas` unless `set_cpu_isa` chose another."""
    return torch.ops.int8kv.cpu_isa()


def set_cpu_isa(isa: str) -> None:
    """Use another CPU kernel path in this process. Raises RuntimeError if the CPU does not have it."""
    torch.ops.int8kv.set_cpu_isa(isa)


def has_cuda_kernels() -> bool:
    """Whether the installed library was built with CUDA kernels."""
    return torch.ops.int8kv.has_cuda_kernels()


def cache_formats() -> list[str]:
    """The names of the cache formats that the kernels have."""
    return torch.ops.int8kv.cache_formats().split(",")
