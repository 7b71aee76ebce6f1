"""Tests of helpers.runtime: the machine, its dtype, the engine, a notebook's start."""

import json
import logging
import os
import platform
import re
import subprocess
import sys
import warnings
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
import torch

from helpers import runtime
from helpers.errors import ConfigError, ModelError, TunebookError
from helpers.runtime import Machine

T4 = Machine("cuda", "Tesla T4", 14.7, (7, 5))
A100 = Machine("cuda", "NVIDIA A100", 39.4, (8, 0))
LAPTOP = Machine("cpu", "x86_64, 2 cores", 8.0, None)

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


@pytest.mark.parametrize(
    ("machine", "wanted", "dtype", "reason"),
    [
        (T4, "auto", "float16", "capability 7.5 has no bf16 units (they start at 8.0)"),
        (T4, "bfloat16", "float16", "capability 7.5 has no bf16 units"),
        (T4, "float16", "float16", "the config asks for dtype='float16'"),
        (A100, "auto", "bfloat16", "8.0 or newer"),
        (A100, "float16", "float16", "the config asks for dtype='float16'"),
        (LAPTOP, "bfloat16", "float32", "16-bit arithmetic is 6 to 60"),
    ],
)
def test_a_machine_computes_in_the_dtype_that_it_has_units_for(
    machine, wanted, dtype, reason
):
    chosen, why = runtime.choose_dtype(machine, wanted)
    assert chosen is getattr(torch, dtype)
    assert reason in why


def test_the_variable_decides_the_dtype_and_a_wrong_one_is_refused(monkeypatch):
    monkeypatch.setenv("TUNEBOOK_DTYPE", "float32")
    dtype, reason = runtime.choose_dtype(A100, "bfloat16")
    assert dtype is torch.float32 and "TUNEBOOK_DTYPE=float32" in reason
    for name in ("fp16", "int8", "nn"):
        monkeypatch.setenv("TUNEBOOK_DTYPE", name)
        with pytest.raises(ConfigError, match=f"TUNEBOOK_DTYPE={name}: not float16, "):
            runtime.choose_dtype(LAPTOP)


@pytest.mark.parametrize("text", ["14GB", "0", "-1", "nan"])
def test_a_memory_cap_that_is_no_size_is_refused(text, monkeypatch):
    monkeypatch.setenv("TUNEBOOK_GPU_GB", text)
    with pytest.raises(ConfigError, match=f"TUNEBOOK_GPU_GB={text}: expected GiB"):
        runtime.memory_cap_gb()


@without_gpu
def test_a_machine_without_a_gpu_is_named_as_such():
    machine = runtime.find_machine()
    assert (machine.device, machine.capability) == ("cpu", None)
    assert machine.name.startswith(platform.machine())
    assert machine.memory_gb > 0.5
    tensor = torch.ones(64 * 2**20, dtype=torch.uint8)
    assert runtime.peak_memory_gb() > tensor.nbytes / 2**30


def test_on_windows_which_has_no_resource_module_memory_is_measured_too(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert 0.05 < runtime.peak_memory_gb() < 1_000


def on_terminal(script, **more):
    """What a script shows on a terminal of its own."""
    termios = pytest.importorskip("termios")  # Windows has none
    main, side = os.openpty()
    termios.tcsetwinsize(side, (24, 100))
    command, root = [sys.executable, "-c", script], Path(__file__).parent.parent
    env = {n: v for n, v in os.environ.items() if n != "TQDM_DISABLE"} | more
    done = subprocess.Popen(command, stderr=side, cwd=root, env=env)
    os.close(side)
    text = b""
    with suppress(OSError):  # at the end of a terminal
        while new := os.read(main, 4096):
            text += new
    os.close(main)
    assert done.wait() == 0, text
    return text.decode()


BARS = """
import sys, time
from helpers import runtime
for _ in runtime.progress(range(4), "answers"):
    time.sleep(0.15)
child = "import sys, time; sys.stderr.write('Writing: 45%'); sys.stderr.flush(); "
runtime.run_command([sys.executable, "-c", child + "time.sleep(1.2)"], "conversion")
"""


def test_a_bar_shows_count_and_time_left_and_goes_and_a_programs_last_words():
    text = on_terminal(BARS)
    assert re.search(r"answers:.*3/4 \[00:00<00:0", text)
    assert re.search(r"conversion: 00:0\d, Writing: 45%", text)
    assert text.rstrip("\r").endswith(" ")  # the line is blank again
    assert on_terminal(BARS, TQDM_DISABLE="1") == ""


def test_in_a_file_there_is_no_bar(run_python):
    assert run_python("-c", BARS).stderr == ""


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise ValueError('no\\n such thing')", "ValueError: no such thing"),
        ("import sys; sys.exit(3)", "exit code 3"),
        ("import sys; print('a note', file=sys.stderr); sys.exit('too wide')", "too w"),
        ("import sys; sys.exit('note\\n  × no uv:\\n  because')", "× no uv: because"),
        ("import os; os.write(2, b'Error: \\xff\\n'); os._exit(1)", "Error: "),
    ],
)
def test_a_program_that_fails_is_told_in_one_sentence(code, reason):
    with pytest.raises(ModelError, match=f"^the quantiser fails: {reason}"):
        runtime.run_command([sys.executable, "-c", code], "the quantiser")


def test_a_program_is_given_a_text_and_its_output_returned():
    late = "import sys, time; time.sleep(1); print(len(sys.stdin.read()))"
    command = [sys.executable, "-c", late]  # longer than a pipe holds
    assert runtime.run_command(command, "count", "abc" * 10**6) == "3000000\n"


def test_the_environment_is_json_and_names_dtype_engine_and_versions(monkeypatch):
    monkeypatch.setattr(runtime, "PACKAGES", "torch no-such-package-here")
    part = json.loads(json.dumps(runtime.environment("transformers")))
    dtype = runtime.choose_dtype(runtime.find_machine())[0]
    assert (part["engine"], f"torch.{part['dtype']}") == ("transformers", str(dtype))
    expected = {"torch": version("torch"), "no-such-package-here": "None"}
    assert part["versions"] == expected


def test_the_hub_is_in_reach_when_its_address_answers(monkeypatch, tmp_path):
    from huggingface_hub import constants

    file = tmp_path / runtime.PROBE.strip("/")
    file.parent.mkdir(parents=True)
    file.touch()
    page = tmp_path.as_uri()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for endpoint, offline, answer in [
        ("http://127.0.0.1:9", "0", False),  # nobody listens
        (page, "0", True),
        (page, "1", False),
        ("huggingface.co", "0", False),  # no address
    ]:
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        runtime.hub_reachable.cache_clear()
        assert runtime.hub_reachable() == answer
        assert constants.HF_HUB_OFFLINE  # once it did not answer


def test_auto_is_unsloth_on_a_gpu_only(monkeypatch):
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: object())
    for available, engine in ((True, "unsloth"), (False, "transformers")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda value=available: value)
        assert runtime.resolve_engine("auto") == engine
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="Unsloth is not installed: run `make setup`"):
        runtime.resolve_engine("unsloth")


START = """
import importlib.util, os, sys
sys.modules["unsloth"] = None
importlib.util.find_spec = lambda name, find=importlib.util.find_spec: (
    object() if name == "unsloth" else find(name))
import helpers
before = os.environ.get("PYTORCH_ALLOC_CONF")
from helpers import runtime
try:
    runtime.start()
except ImportError:
    print("Unsloth is imported first:", "transformers" not in sys.modules)
print(before, os.environ.get("PYTORCH_ALLOC_CONF"))
"""


@pytest.mark.parametrize(
    ("engine", "variables", "allocator"),
    [
        ("unsloth", {}, "expandable_segments:True"),
        ("transformers", {}, "expandable_segments:True"),
        ("transformers", {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, "None"),
    ],
)
def test_the_start_imports_the_engine_of_the_current_run_and_sets_the_allocator(
    engine, variables, allocator, run_factory, run_python, monkeypatch
):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    run = run_factory(engine=engine)
    text = run_python("-c", START, **variables, TUNEBOOK_RUNS=str(run.path.parent))
    before = variables.get("PYTORCH_ALLOC_CONF")  # importing helpers changes nothing
    assert text.stdout.splitlines()[-1] == f"{before} {allocator}"
    assert ("Unsloth is imported first: True" in text.stdout) == (engine == "unsloth")
    if engine == "transformers":
        assert "because" in text.stdout and f"torch {version('torch')}" in text.stdout


def test_unsloths_warning_of_what_it_mends_is_not_shown_its_others_are(monkeypatch):
    monkeypatch.setitem(sys.modules, "unsloth", SimpleNamespace())
    monkeypatch.setattr(runtime, "resolve_engine", lambda engine: "unsloth")
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        runtime.start("unsloth")
        mended = "Unsloth: detected a manual forward/backward run"
        for text in (mended, "Unsloth: CUDA is not linked properly"):
            warnings.warn(text, stacklevel=1)
    texts = [str(warning.message) for warning in shown]
    assert "Unsloth: CUDA is not linked properly" in texts and mended not in texts


def test_messages_go_to_the_stdout_of_the_moment_and_once(capsys, run):
    runtime.start("transformers")
    (run.path / "config.json").write_text("[1]")  # whoever opens the run tells
    runtime.start()
    capsys.readouterr()
    logging.getLogger("helpers.somewhere").info("a message")
    assert capsys.readouterr().out == "a message\n"


def test_a_sentence_in_a_table_is_shown_whole():
    remedy = "failed: run `make setup`, or restart the runtime on Colab, then this cell"
    with pandas.option_context("display.max_colwidth", 50):
        runtime.start("transformers")
        assert remedy in pandas.DataFrame({"verdict": [remedy]}).to_html()


def test_ipython_asks_our_errors_for_their_traceback():
    """`_render_traceback_` is IPython's hook for errors that show themselves."""
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    lines = []
    shell._showtraceback = lambda kind, error, trace: lines.extend(trace)
    shell.run_cell("from helpers import recipes\nrecipes.load('dema')")
    assert len(lines) == 1
    assert lines[0].startswith("ConfigError: no recipe 'dema'; did you mean 'demo'?")


class ColabError(Exception):
    """As `google.colab.errors.Error`."""


@pytest.fixture
def mounted(monkeypatch):
    """The folders that Colab is asked to mount; a test may put in an error to raise."""
    calls = []

    def mount(folder):
        if calls and isinstance(calls[0], Exception):
            raise calls[0]
        calls.append(folder)

    colab = SimpleNamespace(
        drive=SimpleNamespace(mount=mount), errors=SimpleNamespace(Error=ColabError)
    )
    monkeypatch.setitem(sys.modules, "google", SimpleNamespace(colab=colab))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.setenv("TUNEBOOK_RUNS", "")  # to be put back afterwards
    monkeypatch.delenv("TUNEBOOK_RUNS")
    return calls


ON_DRIVE = Path("/content/drive/MyDrive/tunebook/runs")
HERE = runtime.ROOT / "runs"


def test_a_colab_notebook_keeps_its_runs_on_drive_where_that_is_wanted(
    mounted, monkeypatch
):
    runtime.keep_runs("")
    assert (mounted, runtime.runs_folder()) == ([], HERE)
    runtime.keep_runs("drive")
    assert (mounted, runtime.runs_folder()) == (["/content/drive"], ON_DRIVE)
    runtime.keep_runs("")  # the first cell, run again
    assert runtime.runs_folder() == HERE
    monkeypatch.setenv("TUNEBOOK_RUNS", "/elsewhere")
    runtime.keep_runs("drive")
    assert (len(mounted), runtime.runs_folder()) == (1, Path("/elsewhere"))


def test_a_place_on_the_hub_needs_a_token_and_another_place_is_refused(
    monkeypatch, tmp_path
):
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "TUNEBOOK_KEEP"):
        monkeypatch.setenv(name, "")  # to be put back afterwards
        monkeypatch.delenv(name)
    with pytest.raises(ConfigError, match="'hub:me/runs' needs HF_TOKEN"):
        runtime.keep_runs("hub:me/runs")
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    runtime.keep_runs("hub:me/runs")
    assert os.environ["TUNEBOOK_KEEP"] == "hub:me/runs"
    runtime.keep_runs("")  # the first cell, run again
    assert "TUNEBOOK_KEEP" not in os.environ
    monkeypatch.setenv("TUNEBOOK_KEEP", "hub:me/other")
    runtime.keep_runs("drive")  # not of the cell, so it stays
    assert os.environ["TUNEBOOK_KEEP"] == "hub:me/other"
    fault = "KEEP = 'disk': expected 'drive', 'hub:owner"
    with pytest.raises(ConfigError, match=fault):
        runtime.keep_runs("disk")


@pytest.mark.parametrize("error", [ColabError("denied"), ValueError("mount failed")])
def test_a_drive_that_does_not_open_stops_the_first_cell_with_the_remedy(
    error, mounted
):
    mounted.append(error)
    with pytest.raises(TunebookError, match=rf"\({error}\).*KEEP = ''"):
        runtime.keep_runs("drive")
    assert runtime.runs_folder() == HERE


def test_the_first_cell_asks_for_drive_before_anything_is_installed():
    code = (
        f"import sys; sys.path.insert(0, {str(runtime.ROOT)!r})\n"
        "from helpers import install, runtime; runtime.keep_runs('drive')"
    )
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True, env=os.environ)
