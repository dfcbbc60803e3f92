"""Measurements behind the numbers in README.md and benchmarks/README.md; nothing here is installed."""
