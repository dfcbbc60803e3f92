"""`python -m benchmarks.engines`, see `end_to_end.py`."""

import typer

from benchmarks.engines.end_to_end import main

typer.run(main)
