"""Tests of `python -m helpers`, the series of notebooks, and the README's example."""

import re
import signal
import subprocess
import sys
from functools import partial
from importlib import import_module
from inspect import signature
from pathlib import Path

import nbformat
import pytest
import torch

from benchmarks import series
from helpers import __main__ as command_line
from helpers import recipes, runtime
from helpers.inference import items


@pytest.fixture
def call(monkeypatch):
    """Runs a command line; returns the function it would call and the arguments."""
    calls = []
    monkeypatch.setattr(runtime, "start", lambda engine: None)

    class Module:
        def __init__(self, path):
            self.path = path

        def __getattr__(self, name):
            return lambda **given: calls.append((f"{self.path}.{name}", given))

    monkeypatch.setattr(command_line, "import_module", Module)

    def run(*arguments):
        command_line.main(list(arguments))
        return calls.pop()

    return run


def test_options_go_to_the_parameters_of_their_name_and_the_rest_keeps_its_default(
    call, run
):
    name, values = call("evaluate", "test", "--models", "base", "sft")
    assert name == "helpers.evaluation.evaluator.evaluate_run"
    assert values == {"run": run, "labels": ["base", "sft"]}
    name, values = call("generate", "test", "--file", "a.csv", "--out", "b.jsonl")
    assert name == "helpers.inference.items.generate_command"
    assert values == {"model": "test", "file": Path("a.csv"), "out": Path("b.jsonl")}
    assert call("chat", "o/m", "--temperature", "0")[1]["temperature"] == 0
    assert call("export", "test", "--stage", "sft")[1] == {"run": run, "stage": "sft"}


def test_a_judge_is_opened_for_the_commands_that_take_one(call, run, monkeypatch):
    from helpers.llm_judge import judge

    monkeypatch.setattr(judge, "open_judge", lambda *arguments: arguments)
    options = ["--judge", "http://x", "--judge-model", "m"]
    name, values = call("mt-bench", "test", *options, "--limit", "3")
    assert name == "helpers.llm_judge.chat_benchmarks.run_mt_bench"
    assert values == {"run": run, "judge": (run, "http://x", "m"), "limit": 3}
    name, values = call("judge-pairs", "test", "base", "sft", "--other", "test")
    assert values["labels"] == ["base", "sft"] and values["other"] == run
    assert call("alpaca-eval", "test")[1]["judge"] == (run, None, None)


def test_training_takes_a_recipe_or_a_file_and_a_small_version(
    call, run, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # a folder is no recipe
    assert call("train", "demo")[1] == {"config": recipes.load("demo")}
    assert call("train", str(run.path / "config.json"))[1] == {"config": run.config}
    assert call("train", "test")[1] == {"config": run.config}
    small = call("train", "dolly-llama2-7b", "--small")[1]["config"]
    assert small.name == "dolly-llama2-7b-small"
    assert (small.model, small.sft["max_steps"]) == ("smollm2-135m-offline", 10)


@pytest.mark.parametrize(
    ("option", "error"),
    [
        (["--temperature", "-1"], "temperature=-1.0: the least is 0"),
        (["--batch-size", "0"], "batch_size=0: the least is 1"),
        (["--max-new-tokens", "few"], "--max-new-tokens: invalid int value: 'few'"),
    ],
)
def test_a_number_that_nothing_can_use_is_one_sentence(option, error, capsys):
    with pytest.raises(SystemExit, match="2"):
        command_line.main(["generate", "m", "--file", "a", "--out", "b", *option])
    assert error in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "2"),  # argparse lists the commands
        (["mt-bench", "demo", "--limit", "0"], "2"),
        (["train", "none.json"], "^ConfigError: no config at none.json"),
        (["train", "demoo"], "^ConfigError: no recipe 'demoo'; did you mean 'demo'"),
        (["train", "demo", "--gpus", "99"], "--gpus.*(no GPU; without|from 1 to)"),
        (["evaluate", "smoke", "--models", "sftt"], "no model 'sftt': expected base"),
        (["evaluate", "nowhere"], "^ConfigError: no config at .*nowhere"),
    ],
)
def test_what_is_wrong_is_one_sentence(arguments, message, runs_home):
    with pytest.raises(SystemExit, match=message):
        command_line.main(arguments)


def test_a_gpu_that_is_too_small_is_one_sentence(monkeypatch):
    def fill(command, values):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(command_line, "execute", fill)
    with pytest.raises(
        SystemExit,
        match="^OutOfMemoryError: CUDA out of memory: take weights='4bit', a",
    ):
        command_line.main(["train", "demo"])

    def fail(command, values):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(command_line, "execute", fail)
    with pytest.raises(RuntimeError, match="mat1"):
        command_line.main(["train", "demo"])


@pytest.mark.parametrize("command", command_line.COMMANDS)
def test_the_help_of_a_command_lists_parameters_of_its_function(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        command_line.main([command, "--help"])
    purpose, _, rest = command_line.COMMANDS[command].partition(": ")
    function, *options = rest.split()
    text = capsys.readouterr().out
    assert purpose and "_" not in purpose
    assert all(f" {option}" in text or f"[{option}" in text for option in options)
    module, name = function.split(":")
    known = {*signature(getattr(import_module(f"helpers.{module}"), name)).parameters}
    if "options" in known:  # those of a function that both call
        known |= {*signature(items.resolve_model).parameters}
    names = {command_line.OPTIONS.get(o, {}).get("dest", o.strip("-")) for o in options}
    parameters = {name.replace("-", "_") for name in names}
    assert parameters - {"small", "judge_model", "gpus", "shard"} <= known


def test_the_help_says_what_each_command_is_for(capsys):
    with pytest.raises(SystemExit, match="0"):
        command_line.main(["--help"])
    assert "talk to a model" in capsys.readouterr().out


def test_a_python_without_the_packages_is_told_which_one_to_take():
    command = [sys.executable, "-S", "-m", "helpers", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=runtime.ROOT)
    assert done.returncode == 1
    assert re.match(r"No module named '\w+': run `make setup`", done.stderr)
    assert "or install tunebook[stack]" in done.stderr


def test_an_interrupted_command_ends_in_a_sentence():
    command = [sys.executable, "-m", "helpers", "doctor"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # in the background of a shell it is ignored
    options["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    running = subprocess.Popen(command, cwd=runtime.ROOT, **options)
    assert running.stdout.readline()  # the machine; the checks come next
    running.send_signal(signal.SIGINT)
    assert running.communicate()[1].endswith("goes on from what is saved\n")
    assert running.returncode == 1


def write_notebook(path, *cells):
    path.parent.mkdir(exist_ok=True)
    sources = [nbformat.v4.new_code_cell(cell) for cell in cells]
    nbformat.write(nbformat.v4.new_notebook(cells=sources), path)


def outputs(path):
    cells = nbformat.read(path, as_version=4).cells
    return "".join(o.get("text", o.get("evalue", "")) for c in cells for o in c.outputs)


@pytest.fixture
def project(tmp_path, runs_home, monkeypatch):
    """A project with two notebooks; the second fails for the run of another name."""
    monkeypatch.setattr(runtime, "ROOT", tmp_path)
    folder = tmp_path / "notebooks"
    write_notebook(
        folder / "00_setup.ipynb", "import os", "print(os.environ['TUNEBOOK_RUN'])"
    )
    write_notebook(folder / "02_sft_qlora.ipynb", "print(1)", "raise ValueError('no')")
    return folder


def test_the_series_executes_copies_of_the_notebooks_that_a_run_has_a_use_for(
    project, runs_home, capsys
):
    before = (project / "00_setup.ipynb").read_bytes()
    run = series.execute("gsm8k-grpo-llama32-1b")  # it has no SFT
    copies = run.path / "notebooks"
    assert [path.name for path in copies.iterdir()] == ["00_setup.ipynb"]
    assert outputs(copies / "00_setup.ipynb") == "gsm8k-grpo-llama32-1b\n"
    assert (project / "00_setup.ipynb").read_bytes() == before
    assert list(run.report()["notebooks"]["seconds"]) == ["00_setup"]
    shown = capsys.readouterr().out
    assert re.search(r"00_setup.ipynb \d\.\d min, about 0 min left", shown), shown


def test_a_try_takes_the_small_values_of_cells_and_ends_before_the_export(
    project, runs_home
):
    path = project / "00_setup.ipynb"
    write_notebook(path, "STEPS = 600", "print(STEPS)")
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[0].metadata["nbmake"] = {"mock": {"STEPS": 2}}
    nbformat.write(notebook, path)
    (project / "02_sft_qlora.ipynb").rename(project / "05_export.ipynb")
    run = series.execute("smoke")  # which ends before 05
    assert outputs(run.path / "notebooks" / "00_setup.ipynb") == "2\n"
    with pytest.raises(SystemExit, match="05_export.ipynb failed"):
        series.execute("demo")
    copy = run.path.with_name("demo") / "notebooks" / "00_setup.ipynb"
    assert outputs(copy) == "600\n"


def test_a_failing_notebook_ends_the_series_and_leaves_its_copy(project, runs_home):
    with pytest.raises(SystemExit, match="(?s)02_sft_qlora.ipynb failed.*no"):
        series.execute("demo")
    assert outputs(runs_home / "demo/notebooks/02_sft_qlora.ipynb") == "1\nno"


def test_an_interrupted_series_is_an_interrupt_and_no_fault_of_a_library(project):
    code = "import os, signal, time; os.kill(os.getppid(), signal.SIGINT)"
    write_notebook(project / "00_setup.ipynb", f"{code}; time.sleep(5)")
    with pytest.raises(KeyboardInterrupt):
        series.execute("demo")


def test_the_readmes_example_of_own_data_runs(tmp_path, run_python):
    readme = (runtime.ROOT / "README.md").read_text(encoding="utf-8")
    example = re.search(
        r"## Your own data\n.*?```python\n(.*?)```", readme, flags=re.DOTALL
    )
    assert example is not None
    done = run_python("-c", example[1], TUNEBOOK_RUNS=str(tmp_path))
    assert "{'difference': " in done.stdout
