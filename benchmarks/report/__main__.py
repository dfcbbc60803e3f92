"""`python -m benchmarks.report`, see `report.py`."""

import typer

from benchmarks.report.report import main

typer.run(main)
