"""The zoomable plots of the HTML report, with plotly."""

from pathlib import Path

import plotly.graph_objects as go

from vllm_int8kv.commands.bench.summary import by_cache, capacity, case_text, groups, label
from vllm_int8kv.evaluation.record import Group

DASHED = {"dash": "dash", "color": "black"}


def figures(results: Path) -> dict[str, go.Figure]:
    """By title; what was not measured is left out."""
    found: dict[str, go.Figure] = {}
    for config, cases in sorted(groups("throughput", results).items()):
        flights = {group["auto"].case["max_concurrency"] for group in cases}
        draw = flight_figure if len(flights) > 1 else bar_figure
        if cases:
            found[f"Throughput: {config}"] = draw(cases)
    for config, cases in sorted(groups("online", results).items()):
        if cases:
            found[f"Server under load: {config}"] = rate_figure(cases)
    return found


def flight_figure(cases: list[Group]) -> go.Figure:
    """Output tokens per second against requests in flight; dashed lines are what each cache holds."""
    cases = sorted(cases, key=lambda group: group["auto"].case["max_concurrency"] or group["auto"].case["num_requests"])
    flights = [group["auto"].case["max_concurrency"] or group["auto"].case["num_requests"] for group in cases]
    figure = go.Figure()
    highest = max(line.tok_per_s for group in cases for line in group.values())
    for impl, lines in by_cache(cases).items():
        rates = [line and line.tok_per_s for line in lines]
        figure.add_scatter(x=flights, y=rates, name=label(impl))
        fits = capacity(next(line for line in reversed(lines) if line))
        name = f"{fits:.1f} fit: {label(impl)}"
        figure.add_scatter(x=[fits, fits], y=[0, highest], name=name, mode="lines", line=DASHED)
    figure.update_xaxes(tickvals=flights)
    return titled(figure, "requests in flight per replica", "output tokens/s")


def bar_figure(cases: list[Group]) -> go.Figure:
    """Output tokens per second by case; the mark is twice the unquantized cache: half the bytes."""
    names = [case_text(group["auto"].case) for group in cases]
    figure = go.Figure()
    for impl, lines in by_cache(cases).items():
        figure.add_bar(x=names, y=[line and line.tok_per_s for line in lines], name=label(impl))
    bound = [2 * group["auto"].tok_per_s for group in cases]
    mark = {"symbol": "line-ew", "size": 90, "line": {"width": 2, "color": "black"}}
    figure.add_scatter(x=names, y=bound, name="2 x bf16: half the bytes", mode="markers", marker=mark)
    return titled(figure, "requests", "output tokens/s")


def rate_figure(cases: list[Group]) -> go.Figure:
    """Median time to first token against request rate; the dashed line is the objective."""
    cases = sorted(cases, key=lambda group: group["auto"].case["request_rate"])
    rates = [group["auto"].case["request_rate"] for group in cases]
    figure = go.Figure()
    for impl, lines in by_cache(cases).items():
        times = [line and line.metrics["ttft_ms_p50"] for line in lines]
        figure.add_scatter(x=rates, y=times, name=label(impl))
    if limit := cases[0]["auto"].case["goodput_ms"].get("ttft"):
        figure.add_hline(y=limit, line=DASHED, annotation_text="objective")
    return titled(figure, "requests per second", "TTFT p50, ms")


def titled(figure: go.Figure, x: str, y: str, log_x: bool = False) -> go.Figure:
    figure.update_layout(xaxis_title=x, yaxis_title=y, template="plotly_white", margin={"t": 30})
    figure.update_yaxes(rangemode="tozero")
    if log_x:
        figure.update_xaxes(type="log", dtick="D1")
    return figure
