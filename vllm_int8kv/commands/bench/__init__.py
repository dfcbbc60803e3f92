"""`vllm-int8kv bench`: throughput of engines spread over a Ray cluster."""
