"""Tests of helpers.runs: what notebooks hand to each other through a folder."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save

from helpers import files, recipes, runs, runtime
from helpers.config import changed
from helpers.data import preparation
from helpers.errors import ConfigError, DataError, MissingInput, TunebookError
from helpers.evaluation import evaluator
from helpers.llm_judge import chat_benchmarks, pairwise
from helpers.runs import Run
from helpers.widgets import answer_forms

PUBLISHED = sorted((runtime.ROOT / "results").glob("demo_*.json"))


def files_below(folder):
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(str(path.relative_to(folder)) for path in paths)


@pytest.mark.parametrize("part", ["data", "sft", "grpo", "eval", "export"])
def test_require_names_the_notebook_that_makes_what_is_missing(run, part):
    message = f"{run.path}/{part}/a is missing: run the {part} notebook first"
    with pytest.raises(MissingInput, match=f"{message}, or `train "):
        run.require(f"{part}/a")
    assert len([*(runtime.ROOT / "notebooks").glob(f"0*_{part}*.ipynb")]) == 1


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_reports_fit_the_schema(run, path):
    values = json.loads(path.read_text(encoding="utf-8"))
    parts = {k: v for k, v in values.items() if k not in ("command", "conditions")}
    files.write_json(run.path / "report.json", parts)
    assert run.report() == parts


@pytest.mark.parametrize(
    ("part", "values", "fault"),
    [
        ("evals", {}, "evals\n  Extra inputs are not permitted"),
        ("eval", {"base": 0.5}, "eval.base\n .*0.5"),
        ("environment", "cpu", "environment\n .*'cpu'"),
    ],
)
def test_a_misspelt_part_or_a_wrong_type_is_refused_and_nothing_written(
    run, part, values, fault
):
    before = run.report()
    with pytest.raises(TunebookError, match=f"(?s)report.json does not fit.*{fault}"):
        run.write_part(part, values)
    assert run.report() == before


def test_write_part_leaves_the_other_parts_alone(run):
    run.write_part("sft", {"loss": 1.5})
    run.write_part("export", {"right": 3})
    run.write_part("sft", {"loss": 0.5})
    report = run.report()
    assert (report["sft"], report["export"]) == ({"loss": 0.5}, {"right": 3})
    assert report["run"]["name"] == "test"


def test_a_value_that_is_no_json_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "report.json"
    files.write_json(path, {"kept": "Zoë 🎉"})
    with pytest.raises(TypeError, match="not JSON serializable"):
        files.write_json(path, {"bad": object()})
    assert "Zoë 🎉" in path.read_text(encoding="utf-8")
    assert files_below(tmp_path) == ["report.json"]


@pytest.mark.parametrize("other", [("ab",), ("a", ["b"]), ("b", "a"), ("a", "b", None)])
def test_a_fingerprint_differs_for_other_values(other):
    assert files.fingerprint("a", "b") != files.fingerprint(*other)
    assert files.fingerprint({"a": 1, "b": 2}) == files.fingerprint({"b": 2, "a": 1})


def test_a_saved_run_opens_as_it_was_saved_with_what_is_already_done(run):
    run.write_part("sft", {"loss": 1.5})
    assert runs.save_run(run.config) == runs.open_run("test") == run
    assert run.report()["sft"] == {"loss": 1.5}


def test_a_name_goes_before_the_variable_and_that_before_the_current_run(
    run_factory, monkeypatch
):
    first, second, third = (run_factory(name=name) for name in ("a", "b", "c"))
    assert runs.open_run() == third
    monkeypatch.setenv("TUNEBOOK_RUN", "b")
    assert runs.open_run() == second
    assert runs.open_run("a") == first


def test_the_first_use_makes_the_run_of_the_variable_or_without_a_gpu_of_the_demo(
    runs_home, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runs.open_run().config == recipes.load("demo")
    shutil.rmtree(runs_home)
    monkeypatch.setenv("TUNEBOOK_RECIPE", "smoke")
    run = runs.open_run()
    assert run == Run(runs_home / "smoke", recipes.load("smoke"))
    assert files_below(runs_home) == [
        "current",
        "smoke/config.json",
        "smoke/report.json",
    ]


def test_a_recipes_name_opens_its_run_with_the_settings_it_was_saved_with(runs_home):
    assert runs.open_run("smoke").config == recipes.load("smoke")
    saved = runs.save_run(changed(recipes.load("smoke"), seed=7))
    assert runs.open_run("smoke") == saved


def test_a_run_that_is_not_there_is_refused_by_its_path(run):
    with pytest.raises(ConfigError, match="no config at .*nowhere/config.json; run "):
        runs.open_run("nowhere")
    shutil.rmtree(run.path)
    with pytest.raises(ConfigError, match="no config at .*test/config.json; run "):
        runs.open_run()


def test_a_content_hash_changes_with_the_weights_alone(tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"1")
    before = files.content_hash(tmp_path)
    (tmp_path / "notes.md").write_text("nothing")
    assert files.content_hash(tmp_path) == before
    weights.write_bytes(b"2")
    assert files.content_hash(tmp_path) != before
    assert files.content_hash("owner/name") == "owner/name"


HOLDS = """
import sys
from helpers import runs

run = runs.open_run(sys.argv[1])
with runs.hold(run):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_run_is_written_to_by_one_process_at_a_time(run, caplog):
    runs.save_run(run.config)
    command = [sys.executable, "-c", HOLDS, run.config.name]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout.readline() == "held\n"
        fault = f"is written to by process {other.pid} on .*: wait for its end"
        for write in (
            lambda: preparation.prepare(run),
            lambda: runs.save_run(run.config),
            lambda: evaluator.compare(run, "base", "sft"),
            lambda: pairwise.judge_pairs(run, ("base", "sft"), None),
            lambda: chat_benchmarks.run_mt_bench(run, None),
            lambda: chat_benchmarks.run_alpaca_eval(run, None, reference=run.path),
            lambda: answer_forms.blind_results(run, ("base", "sft")),
        ):
            with pytest.raises(TunebookError, match=fault):
                write()
        other.kill()
    with runs.hold(run), runs.hold(run):  # a killed one is no hindrance
        assert f"process {other.pid} on {socket.gethostname()} is gone" in caplog.text
    assert not (run.path / "lock.json").exists()


def test_other_processes_of_a_run_leave_the_lock_alone_while_it_is_written(
    run, monkeypatch
):
    lock = run.path / "lock.json"
    lock.write_bytes(b"")  # as the first process has it for a moment
    monkeypatch.setenv("RANK", "1")
    with runs.hold(run):
        assert lock.exists()
    assert lock.exists()


@pytest.mark.parametrize(("silent_s", "is_free"), [(5, False), (600, True)])
def test_a_lock_of_another_host_is_taken_over_once_it_shows_no_sign_of_life(
    run, silent_s, is_free
):
    lock, then = run.path / "lock.json", time.time() - silent_s
    files.write_json(lock, {"host": "elsewhere", "pid": 1})
    os.utime(lock, (then, then))
    if not is_free:
        with pytest.raises(TunebookError, match="process 1 on elsewhere"):
            with runs.hold(run):
                pass
        assert lock.exists()
    else:
        with runs.hold(run):
            assert files.read_json(lock)["pid"] == os.getpid()


def test_a_lock_that_is_given_back_does_not_come_again(run, monkeypatch):
    monkeypatch.setattr(runs, "BEAT_S", 0)
    for _ in range(300):
        with runs.hold(run):
            pass
        assert not (run.path / "lock.json").exists()


@pytest.mark.parametrize("name", ["config.json", "report.json", "lock.json"])
@pytest.mark.parametrize("content", [b"", b'{"run": {', b"\xff\x00", b"[1]"])
def test_a_damaged_state_file_is_named_and_kept_aside(run, name, content):
    def use():
        with runs.hold(runs.open_run("test")):
            run.report()

    (run.path / name).write_bytes(content)
    aside = f"{name}.damaged-1"
    fault = f"{name} is damaged and now named {aside}: mend it and name it {name} again"
    with pytest.raises(TunebookError, match=fault):
        use()
    assert (run.path / aside).read_bytes() == content
    if name == "config.json":
        with pytest.raises(ConfigError, match="no config at .*; run notebook 00_setup"):
            use()
        runs.save_run(run.config)
    use()


def test_damaged_rows_are_set_aside_and_whole_ones_stay(tmp_path, caplog):
    path, text = tmp_path / "test.jsonl", '{"id": 1}\n{"id": \n{"id": 3}\n{"id"'
    path.write_text(text)
    assert files.read_rows(path) == files.read_rows(path) == [{"id": 1}, {"id": 3}]
    assert "2 rows stay, all are in" in caplog.text
    assert (tmp_path / "test.jsonl.damaged-1").read_text() == text


def test_rows_that_data_lost_are_noticed_and_prepared_again_once_moved_away(run):
    preparation.prepare(run)
    path = run.require("data/train.jsonl")
    whole = path.read_text()
    path.write_text("\n".join(whole.splitlines()[:-2]) + "\n")
    left, all_ = path.read_text().count("\n"), whole.count("\n")
    fault = f"train.jsonl has {left} rows, not the {all_} written: move it away to prep"
    with pytest.raises(DataError, match=fault):
        run.require("data/train.jsonl")
    path.rename(run.path / "data" / "mine.jsonl")
    preparation.ensure_data(run)
    assert run.require("data/train.jsonl").read_text() == whole


def test_data_that_the_report_does_not_know_are_prepared_again(run):
    part = preparation.prepare(run)
    (run.path / "report.json").unlink()  # killed between data and report, say
    preparation.ensure_data(run)
    assert run.report()["data"] == part


def test_a_copied_run_goes_by_its_folders_name(run):
    shutil.copytree(run.path, run.path.with_name("copy"))
    before = (run.path / "config.json").read_text()
    copy = runs.open_run("copy")
    assert (copy.path.name, copy.config.name) == ("copy", "copy")
    runs.save_run(changed(copy.config, seed=8))
    assert (run.path / "config.json").read_text() == before


def test_what_is_set_aside_overwrites_nothing_though_names_have_gaps(tmp_path):
    for number in (2, 11):
        (tmp_path / f"sft.before-{number}").mkdir()
    (tmp_path / "sft").mkdir()
    assert files.set_aside(tmp_path / "sft", "before").name == "sft.before-12"
    assert len(list(tmp_path.iterdir())) == 3


def test_a_damaged_adapter_is_named_before_a_model_is_loaded(run):
    file = run.path / "sft" / "adapter" / "adapter_model.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(save({"lora": torch.ones(9)})[:-4])
    with pytest.raises(MissingInput, match="sft/adapter is damaged: train sft again"):
        evaluator.evaluate_run(run, ["sft"])
