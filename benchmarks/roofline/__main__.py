"""`python -m benchmarks.roofline`, see `roofline.py`."""

import typer

from benchmarks.roofline.roofline import main

typer.run(main)
