"""Writes the tables of README.md and the plots from the records.

    python benchmarks/report.py            rewrite what lies between the markers, and the plots
    python benchmarks/report.py --check    exit with 1 if that would change anything

A table named NAME goes between `<!-- begin:NAME -->` and `<!-- end:NAME -->`.
"""

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

if not __package__:  # run as a script: this folder has a `kernels`, which transformers would take for its own
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import quantize_plots, quantize_tables, record
from benchmarks.plots import PLOTS as KERNEL_PLOTS
from benchmarks.plots import plot_problem
from benchmarks.tables import TABLES as KERNEL_TABLES
from benchmarks.throughput_tables import online_table, throughput_table

TABLES = KERNEL_TABLES | quantize_tables.TABLES | {"throughput": throughput_table, "online": online_table}
PLOTS = KERNEL_PLOTS | quantize_plots.PLOTS
PLOT_FOLDER = record.ROOT / "benchmarks" / "plots"
README = record.ROOT / "README.md"


def render(readme: str, results: Path) -> str:
    """README with every table replaced. Raises ValueError for a table without its markers or the reverse."""
    present = re.findall(r"<!-- begin:([\w-]+) -->", readme)
    if unknown := sorted(set(present) - TABLES.keys()):
        raise ValueError(f"README.md has markers {unknown}, but there are only the tables {sorted(TABLES)}")
    for name, table in TABLES.items():
        begin, end = f"<!-- begin:{name} -->", f"<!-- end:{name} -->"
        if readme.count(begin) != 1 or readme.count(end) != 1 or readme.index(begin) > readme.index(end):
            raise ValueError(f"README.md must have {begin} and then {end}, once each")
        before, rest = readme.split(begin)
        readme = f"{before}{begin}\n\n{table(results)}\n\n{end}{rest.split(end)[1]}"
    return readme


def main(
    check: Annotated[bool, typer.Option("--check", help="change nothing, fail on differences")] = False,
    results: Annotated[Path, typer.Option(help="folder of the records")] = record.RESULTS,
    readme: Annotated[Path, typer.Option(help="file with the markers")] = README,
    plots: Annotated[Path, typer.Option(help="folder of the plots")] = PLOT_FOLDER,
    html: Annotated[Path | None, typer.Option(help="also write a self-contained HTML report to this file")] = None,
) -> None:
    """Generate README's tables and plots from the records."""
    text = readme.read_text()
    try:
        wanted = render(text, results)
    except ValueError as error:
        sys.exit(str(error))
    if not check:
        readme.write_text(wanted)
    problems = [f"{readme.name} differs from the records"] if check and wanted != text else []
    for name, (data, draw) in PLOTS.items():
        if found := data(results):
            plot = plots / f"{name}.png"
            if not check:
                draw(found, plot)
            if problem := plot_problem(plot, found):
                problems.append(problem)
    if html is not None:
        from benchmarks import html_report  # plotly is slow to import

        html_report.write(results, html)
    if problems:
        sys.exit("; ".join(problems) + "; run `python benchmarks/report.py`")


if __name__ == "__main__":
    typer.run(main)
