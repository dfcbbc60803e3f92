"""What quantization costs: through vLLM, simulated, and on a model with outliers in its keys."""
