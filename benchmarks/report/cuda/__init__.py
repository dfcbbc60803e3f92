"""What is known of the CUDA kernels without a GPU."""
