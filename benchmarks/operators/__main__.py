"""`python -m benchmarks.operators`, see `kernels.py`."""

import typer

from benchmarks.operators.kernels import main

typer.run(main)
