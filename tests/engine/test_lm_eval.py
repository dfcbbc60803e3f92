"""lm-evaluation-harness against `vllm-int8kv serve`, on a task of eight questions that needs no download.

Opt-in, for its sixty dependencies: `pip install 'vllm-int8kv[lm-eval]'`, then `pytest -m lm_eval`.
"""

import json
import os
import subprocess
import sys

import pytest
from test_server import server as server  # the fixture

from vllm_int8kv.commands import models

pytestmark = pytest.mark.lm_eval

CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Egypt": "Cairo",
    "Spain": "Madrid",
    "Germany": "Berlin",
    "China": "Beijing",
    "Russia": "Moscow",
}
TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "The capital of {{{{country}}}} is"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


def test_a_task_through_the_server(server, tmp_path):  # noqa: F811
    names = list(CAPITALS.values())
    lines = [{"country": c, "choices": names, "answer": names.index(city)} for c, city in CAPITALS.items()]
    data = tmp_path / "capitals.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "capitals.yaml").write_text(TASK.format(data=data))
    arguments = f"model=smollm2,tokenizer={models.smollm2()},base_url={server.url}/v1/completions,num_concurrent=4"
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", arguments]
    command += ["--tasks", "capitals", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (report,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(report.read_text())["results"]["capitals"]["acc,none"] >= 0.75
