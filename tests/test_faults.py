"""A seeded share of what `benchmarks/faults.py` plants."""

import json


def test_a_kill_a_stop_a_damaged_file_and_a_bad_input_cost_nothing(
    run_python, tmp_path
):
    out = tmp_path / "faults.json"
    run_python("benchmarks/faults.py", "--share", "1", "--out", str(out))
    report = json.loads(out.read_text())
    kills, bad = report["kills"], report["bad_inputs"]
    assert kills["survived"] == kills["n"] == 1
    assert kills["identical"] == kills["asked"]
    assert report["faults"] == {"handled": 1, "n": 1}
    assert bad == {"clear": 1, "n": 1, "tracebacks": 0, "silent": 0}
    assert report["stop_button"] == {"right": 1, "n": 1}
    assert len(report["rows"]) == 4
