"""How the cache enters vLLM: registration, attention backend, calibration, what is refused."""
