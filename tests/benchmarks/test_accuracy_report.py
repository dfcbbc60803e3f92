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


def test_schemes_table_has_bits_and_tails(tmp_path):
    assert "Not measured yet" in accuracy_tables.schemes_table(tmp_path)

    def simulated(kl, bits):
        errors = {"e_a": [1e-4, 3e-4], "e_o": [0.1]}
        return errors | {"kl_per_token": kl, "kl_p999": 50 * kl, "bits_per_element": bits}

    append("schemes", "bf16", simulated(1e-5, 16.0), tmp_path)
    append("schemes", "k6v4", simulated(8e-3, 5.5), tmp_path)
    append("schemes", "k6v4", simulated(9e-3, 5.5), tmp_path, stress=128)
    append("schemes", "fp8", simulated(1e-2, 8.0), tmp_path)
    append("schemes", "fp8", simulated(7.0, 8.0), tmp_path, stress=128, tokens=15)
    table = accuracy_tables.schemes_table(tmp_path)
    eight, fewer = table.split("**Fewer bits**")
    assert eight.startswith("**8 bits and more**") and "| bf16 | 16.00 | 1.0e-05 | 5.0e-04 | - | - |" in eight
    assert "| k6v4 | 5.50 | 8.0e-03 | 4.0e-01 | 9.0e-03 | 4.5e-01 | 2.0e-04 | 1.0e-01 |" in fewer
    assert "| 8.00 | 1.0e-02 | 5.0e-01 | - | - |" in fewer, "other texts are not compared"
    assert fewer.count("| k6v4 |") == 2, "beside its alternatives once more"
    assert "Texts and their tokens: prose (16)." in table


def test_formats_table_compares_a_format_with_itself_on_the_same_texts(tmp_path):
    assert "Not measured yet" in accuracy_tables.formats_table(tmp_path)

    def decoded(kl):
        return {"paths": {"decode": scores(decode=kl)["paths"]["decode"] | {"perplexity_change": {"value": 0.01}}}}

    append("formats", "k6v4", decoded(2e-3), tmp_path)
    append("formats", "k6v4", decoded(3e-3), tmp_path, stress=128)
    append("formats", "fp8", decoded(4e-3), tmp_path)
    append("formats", "fp8", decoded(9e-3), tmp_path, stress=128, tokens=99)
    _, _, k6v4, fp8, *_ = accuracy_tables.formats_table(tmp_path).splitlines()
    assert k6v4 == "| k6v4 | 2.91x | 3.05x | 2.0e-03 ± 2e-03 | 0.5x | +1.00% | 3.0e-03 ± 2e-03 | 1.50x |"
    assert fp8 == "| fp8 | 2.00x | 2.00x | 4.0e-03 ± 3e-03 | 1x | +1.00% | - | - |"


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
