"""The command line `vllm-int8kv`."""
