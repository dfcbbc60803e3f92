"""What can be said of the compiled CUDA kernels without a GPU: registers, shared memory and instructions."""
