"""`vllm-int8kv tune`: which bits for which layer."""
