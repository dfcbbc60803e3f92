"""What the processor of this machine is good at."""


def has_fast_bf16() -> bool:
    """Whether matrices in bf16 are multiplied in hardware; not so on CPUs without AVX-512 or AVX-NE-CONVERT."""
    import torch

    if torch.cuda.is_available():
        return True
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
