"""What a cache costs, measured through vLLM: accuracy, sensitivity of layers, the demo, records."""
