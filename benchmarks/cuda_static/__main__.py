"""`python -m benchmarks.cuda_static`, see `cuda_static.py`."""

import typer

from benchmarks.cuda_static.cuda_static import main

typer.run(main)
