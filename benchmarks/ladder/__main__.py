"""`python -m benchmarks.ladder`, see `quantize.py`."""

import typer

from benchmarks.ladder.quantize import main

typer.run(main)
