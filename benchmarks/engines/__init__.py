"""Output tokens per second of whole engines."""
