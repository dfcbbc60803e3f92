"""Measurements behind the numbers in README.md; nothing here is installed."""
