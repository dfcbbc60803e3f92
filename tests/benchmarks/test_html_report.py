"""The HTML report works by itself in a browser: tables sort, plots zoom, nothing is loaded, no script fails."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

from benchmarks.report import html as html_report
from vllm_int8kv.evaluation import record

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")

WATCH = "<script>window.problems = []; window.onerror = (message) => { window.problems.push(message); };</script>"
ACT = """<script>
window.addEventListener("load", () => {
  const table = document.querySelector("table#decode");
  const column = [...table.querySelectorAll("th")].findIndex((head) => head.textContent === "median_us");
  const values = () => [...table.tBodies[0].rows].map((row) => Number(row.cells[column].textContent));
  const click = () => { table.querySelectorAll("th")[column].click(); return values(); };
  const plot = document.querySelector(".plotly-graph-div");
  const range = () => plot._fullLayout.yaxis.range.slice();
  const result = { given: values(), ascending: click(), descending: click(), full: range() };
  Plotly.relayout(plot, { "yaxis.range": [1, 2] }).then(() => {
    result.zoomed = range();
    result.plots = document.querySelectorAll(".plotly-graph-div .main-svg").length;
    result.problems = window.problems;
    const out = document.createElement("pre");
    out.id = "result";
    out.textContent = JSON.stringify(result);
    document.body.append(out);
  });
});
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("html") / "report.html"
    html_report.write(RESULTS, path)
    return path.read_text()


def test_nothing_is_loaded(page):
    tags = re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page)
    assert not [tag for tag in tags if re.search(r"\b(?:src|href)=", tag)]
    assert "<table" in page


def test_every_record_is_a_row(page):
    for path in RESULTS.glob("*.jsonl"):
        body = page.split(f'<table id="{path.stem}">')[1].split("<tbody>")[1].split("</tbody>")[0]
        assert body.count("<tr>") == len(record.latest(record.read(path.stem)))


def test_text_is_escaped(tmp_path):
    source = (RESULTS / "decode.jsonl").read_text().splitlines()[0]
    line = json.loads(source) | {"command": "<script>alert(1)</script>"}
    (tmp_path / "decode.jsonl").write_text(json.dumps(line))
    html_report.write(tmp_path, tmp_path / "report.html")
    assert "<script>alert" not in (tmp_path / "report.html").read_text()


def test_tables_sort_and_plots_zoom_in_a_browser(page, tmp_path):
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser; any of {', '.join(BROWSERS)} will do")
    path = tmp_path / "report.html"
    path.write_text(page.replace("<head>", f"<head>{WATCH}").replace("</body>", f"{ACT}</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--timeout=60000"]
    options += [f"--user-data-dir={tmp_path}/profile", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command = [browser, *options, "--virtual-time-budget=20000", "--dump-dom", path.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=180).stdout
    found = re.search(r'<pre id="result">(.*?)</pre>', dom)
    assert found, dom[-2000:]
    result = json.loads(unescape(found[1]))
    assert result["problems"] == []
    assert result["ascending"] == sorted(result["given"]) != result["given"]
    assert result["descending"] == sorted(result["given"], reverse=True)
    assert result["zoomed"] == [1, 2] != result["full"]
    assert result["plots"] >= 1
