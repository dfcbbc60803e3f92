"""Where commands print, and how they fail."""

import os
from pathlib import Path

import typer
from rich.console import Console
from rich.text import Text

LOG_WIDTH = 160
"""Columns of a file or pipe, where rich would squeeze tables into 80 and cut numbers off."""
console = Console()
error_console = Console(stderr=True)
if not (console.is_terminal or "COLUMNS" in os.environ):
    console.width = LOG_WIDTH


def fail(message: str) -> typer.Exit:
    """Print an error and return what to raise."""
    error_console.print(Text.assemble(("Error: ", "bold red"), message), soft_wrap=True)
    return typer.Exit(1)


def check_files(files: dict[str, Path | None]) -> None:
    """Fail before anything is measured if a file, by the option that names it, could not be written afterwards."""
    for option, path in files.items():
        if path is not None and not path.absolute().parent.is_dir():
            raise fail(f"{option}: the folder {path.absolute().parent} does not exist")
        if path is not None and path.is_dir():
            raise fail(f"{option}: expected a file, {path} is a folder")
