"""The HTML report: the plots and records of `vllm-int8kv bench`, and a plot of the operators."""

from pathlib import Path

import plotly.graph_objects as go

from benchmarks.report.plots import decode_plot_data
from benchmarks.report.tables import impls_of, sizes
from vllm_int8kv.commands.bench import html_report
from vllm_int8kv.commands.bench.figures import DASHED, titled
from vllm_int8kv.evaluation.record import LABELS, Group


def write(results: Path, path: Path) -> None:
    """Render all records of a folder."""
    decode = decode_plot_data(results)
    html_report.write(results, path, {"Decode attention: KV cache read": decode_figure(decode)} if decode else {})


def decode_figure(found: list[Group]) -> go.Figure:
    """Bandwidth against context length; the dashed line is what the memory can deliver."""
    contexts = [sizes(group)[1] for group in found]
    figure = go.Figure()
    bound = [max(line.read_gb_per_s for line in group.values()) for group in found]
    figure.add_scatter(x=contexts, y=bound, name="streaming read (bound)", line=DASHED)
    for impl in impls_of(found):
        figure.add_scatter(x=contexts, y=[group[impl].gb_per_s for group in found], name=LABELS[impl])
    return titled(figure, "context, tokens per sequence", "GB/s", log_x=True)
