"""The per-channel quantization kernels of arXiv 2601.04719: times and errors."""
