"""The accuracy tables and the plot of layers, from made-up records."""

from benchmarks.accuracy import accuracy_record
from benchmarks.report import accuracy_tables, plots

PLAIN = "int8_custom:rotate_keys=false:equalize_keys=false"
SHAPE = {"num_kv_heads": 2, "head_size": 64, "itemsize": 2}


def append(what, impl, metrics, folder, stress=1, tokens=16):
    case = {"model": "a model", "stress": stress, "dtype": "float32", "texts": {"prose": tokens}}
    accuracy_record.append(what, case, impl, metrics, folder / "accuracy")


def scores(**paths):
    bounds = {name: {"value": kl, "low": kl / 2, "high": 2 * kl} for name, kl in paths.items()}
    return {"paths": {name: {"kl_per_token": kl} for name, kl in bounds.items()}}


def test_paths_table_takes_runs_of_every_path(tmp_path):
    assert "Not measured yet" in accuracy_tables.paths_table(tmp_path)
    append("engine", "int8_custom", scores(decode=9.0), tmp_path, tokens=99)
    assert "Not measured yet" in accuracy_tables.paths_table(tmp_path)
    cells = [{"length": 512, "depth": depth, "found": depth > 0} for depth in (0.0, 0.5, 1.0)]
    four = scores(decode=1e-3, prefill=2e-3, chunked=3e-3, prefix=4e-3)
    append("engine", "int8_custom", four | {"needle": cells}, tmp_path)
    append("engine", "fp8", scores(decode=1.0, prefill=2.0, chunked=3.0, prefix=4.0), tmp_path)
    _, _, *rows = accuracy_tables.paths_table(tmp_path).splitlines()
    expected = "| `int8_custom` | 1.0e-03 ± 8e-04 | 2.0e-03 ± 2e-03 | 3.0e-03 ± 2e-03 | 4.0e-03 ± 3e-03 | 2 of 3 |"
    assert rows[0] == expected
    assert rows[1].startswith("| vLLM `fp8` (e4m3) | 1.0e+00") and rows[1].endswith("| - |")


def test_layers_plot_marks_what_is_skipped_and_notices_other_records(tmp_path):
    layers = [{"layer": layer, "kl_per_token": kl, "e_o": 0.01, "shape": SHAPE} for layer, kl in ((0, 1.0), (1, 9.0))]
    report = {"layers": layers, "kl_all_layers": 11.0, "policy": {1: "auto"}}
    append("layers", "int8_custom", report, tmp_path)
    assert plots.layers_plot_data(tmp_path) == [], "one of two panels"
    append("layers", PLAIN, report, tmp_path, stress=128)
    found = plots.layers_plot_data(tmp_path)
    drawn = tmp_path / "layers.png"
    plots.draw_layers(found, drawn)
    assert plots.plot_problem(drawn, found) is None
    append("layers", PLAIN, report | {"kl_all_layers": 12.0}, tmp_path, stress=128)
    assert plots.plot_problem(drawn, plots.layers_plot_data(tmp_path)) == "layers.png was drawn from other records"


def test_bars_of_skipped_layers_are_red():
    import matplotlib.pyplot as plt

    from vllm_int8kv.evaluation.sensitivity import draw_bars

    figure, axes = plt.subplots()
    draw_bars([{"layer": 1, "kl_per_token": 9.0}, {"layer": 0, "kl_per_token": 1.0}], [1], axes)
    colors = [bar.get_facecolor()[:3] for bar in axes.patches]
    assert [bar.get_height() for bar in axes.patches] == [1.0, 9.0]
    assert colors[1][0] > 0.8 > colors[0][0]
    plt.close(figure)
