"""One HTML file with every record: sortable tables, zoomable plots, nothing loaded from anywhere."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
import plotly.io
from plotly.offline import get_plotlyjs

from vllm_int8kv.commands.bench.figures import figures
from vllm_int8kv.evaluation import record
from vllm_int8kv.evaluation.record import Record

TEMPLATE = Path(__file__).with_name("report.html.jinja")
HIDDEN = ("schema", "what", "checked")
CONFIG = {"responsive": True, "displaylogo": False, "scrollZoom": True}


def write(results: Path, path: Path, more: Mapping[str, go.Figure] | None = None) -> None:
    """Render all records of a folder, below the plots of their throughput and `more` by title."""
    plots = {
        title: plotly.io.to_html(figure, full_html=False, include_plotlyjs=False, config=CONFIG)
        for title, figure in ((more or {}) | figures(results)).items()
    }
    tables = {file.stem: table(record.read(file.stem, results)) for file in sorted(results.glob("*.jsonl"))}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(TEMPLATE.read_text())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page.render(plots=plots, tables=tables, plotly_js=get_plotlyjs()))


def table(lines: list[Record]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the newest records; what no record has is no column."""
    flat = [flatten(asdict(line)) for line in record.latest(lines)]
    columns = list(dict.fromkeys(name for row in flat for name, value in row.items() if value is not None))
    return columns, [[row.get(name) for name in columns] for row in flat]


def flatten(fields: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings side by side; lists and empty mappings as text."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        if name in HIDDEN:
            continue
        if isinstance(value, dict) and value:
            flat |= flatten(value)
        else:
            flat[name] = str(value) if isinstance(value, dict | list) else value
    return flat
