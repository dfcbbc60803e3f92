"""`python -m benchmarks.accuracy`, see `accuracy.py`."""

from benchmarks.accuracy.accuracy import app

app()
