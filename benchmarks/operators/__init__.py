"""Latency and bandwidth of the operators, against vLLM's and other libraries'."""
