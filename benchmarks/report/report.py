"""Writes the tables of README.md, benchmarks/README.md and tests/README.md and the plots from the records.

    python -m benchmarks.report            rewrite what lies between the markers, and the plots
    python -m benchmarks.report --check    exit with 1 if that would change anything

A table named NAME goes between `<!-- begin:NAME -->` and `<!-- end:NAME -->`, in one of the pages.
"""

import re
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.report import (
    accuracy_tables,
    headline_tables,
    reliability_tables,
    throughput_tables,
    tuning_tables,
    xquant_tables,
)
from benchmarks.report.cuda import tables as cuda_tables
from benchmarks.report.ladder import plots as ladder_plots
from benchmarks.report.ladder import tables as ladder_tables
from benchmarks.report.plots import PLOTS as KERNEL_PLOTS
from benchmarks.report.plots import plot_problem
from benchmarks.report.tables import TABLES as KERNEL_TABLES
from vllm_int8kv.evaluation import record

TABLES = (
    headline_tables.TABLES
    | KERNEL_TABLES
    | ladder_tables.TABLES
    | throughput_tables.TABLES
    | accuracy_tables.TABLES
    | tuning_tables.TABLES
    | xquant_tables.TABLES
    | reliability_tables.TABLES
    | cuda_tables.TABLES
)
PLOTS = KERNEL_PLOTS | ladder_plots.PLOTS | tuning_tables.PLOTS
PLOT_FOLDER = record.ROOT / "benchmarks" / "plots"
PAGES = [record.ROOT / page for page in ("README.md", "benchmarks/README.md", "tests/README.md")]
MARKER = re.compile(r"<!-- (begin|end):([\w-]+) -->")


def render(pages: list[str], results: Path) -> list[str]:
    """The pages with every table replaced. Raises ValueError for a table without its markers or the reverse."""
    found = [marker for page in pages for marker in MARKER.findall(page)]
    if unknown := sorted({name for _, name in found} - TABLES.keys()):
        raise ValueError(f"the pages have markers {unknown}, but there are only the tables {sorted(TABLES)}")
    for name in TABLES:
        if [marker for marker in found if marker[1] == name] != [("begin", name), ("end", name)]:
            raise ValueError(f"the pages must have <!-- begin:{name} --> and then <!-- end:{name} -->, once each")
    return [
        re.sub(rf"({MARKER.pattern}).*?<!-- end:\3 -->", partial(_table, results), page, flags=re.S) for page in pages
    ]


def _table(results: Path, found: re.Match[str]) -> str:
    begin, _, name = found.groups()
    return f"{begin}\n\n{TABLES[name](results)}\n\n<!-- end:{name} -->"


def main(
    check: Annotated[bool, typer.Option("--check", help="change nothing, fail on differences")] = False,
    results: Annotated[Path, typer.Option(help="folder of the records")] = record.RESULTS,
    page: Annotated[list[Path] | None, typer.Option(help="file with markers; may be repeated")] = None,
    plots: Annotated[Path, typer.Option(help="folder of the plots")] = PLOT_FOLDER,
    html: Annotated[Path | None, typer.Option(help="also write a self-contained HTML report to this file")] = None,
) -> None:
    """Generate the tables and plots from the records."""
    paths = page or PAGES
    texts = [path.read_text() for path in paths]
    try:
        wanted = render(texts, results)
    except ValueError as error:
        sys.exit(str(error))
    problems = []
    for path, before, after in zip(paths, texts, wanted, strict=True):
        if not check:
            path.write_text(after)
        elif before != after:
            problems.append(f"{path} differs from the records")
    for name, (data, draw) in PLOTS.items():
        if found := data(results):
            plot = plots / f"{name}.png"
            if not check:
                draw(found, plot)
            if problem := plot_problem(plot, found):
                problems.append(problem)
    if html is not None:
        from benchmarks.report.html import write  # plotly is slow to import

        write(results, html)
    if problems:
        sys.exit("; ".join(problems) + "; run `python -m benchmarks.report`")
