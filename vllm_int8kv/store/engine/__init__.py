"""What of the store runs inside an engine: vLLM's connector, lookups of the scheduler, transfers of the workers."""
