"""Tests of helpers.runtime: the machine, its dtype, and what it says of itself."""

from __future__ import annotations

import http.server
import json
import os
import platform
import random
import subprocess
import sys
import threading
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from helpers import runs, runtime
from helpers.config import RunConfig
from helpers.runtime import Machine

T4 = Machine("colab", "cuda", "Tesla T4", 14.7, (7, 5))
A100 = Machine("local", "cuda", "NVIDIA A100", 39.4, (8, 0))
LAPTOP = Machine("local", "cpu", "x86_64, 2 cores", 8.0, None)

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


@pytest.fixture(autouse=True)
def no_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TUNEBOOK_DTYPE", "TUNEBOOK_GPU_GB"):
        monkeypatch.delenv(name, raising=False)


def test_a_t4_computes_in_float16_because_it_has_no_bf16_units() -> None:
    dtype, reason = runtime.choose_dtype(T4)
    assert dtype is torch.float16
    assert reason == "compute capability 7.5 has no bf16 units (they start at 8.0)"


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_a_newer_gpu_computes_in_bfloat16(capability: tuple[int, int]) -> None:
    dtype, reason = runtime.choose_dtype(A100._replace(capability=capability))
    assert dtype is torch.bfloat16
    assert "8.0 or newer" in reason


def test_a_cpu_computes_in_float32() -> None:
    dtype, reason = runtime.choose_dtype(LAPTOP)
    assert dtype is torch.float32
    assert reason.startswith("CPUs without bf16")


@pytest.mark.parametrize("asked", ["float16", "bfloat16"])
def test_an_asked_dtype_is_taken_where_the_gpu_has_units_for_it(asked: str) -> None:
    dtype, reason = runtime.choose_dtype(A100, asked)
    assert dtype is getattr(torch, asked)
    assert reason == f"the config asks for dtype={asked!r}"


def test_bfloat16_on_a_t4_is_float16_and_the_reason_says_what_was_asked() -> None:
    dtype, reason = runtime.choose_dtype(T4, "bfloat16")
    assert dtype is torch.float16
    assert "no bf16 units (they start at 8.0; bfloat16 is asked for)" in reason


@pytest.mark.parametrize("asked", ["float16", "bfloat16"])
def test_a_cpu_computes_in_float32_whatever_is_asked(asked: str) -> None:
    dtype, reason = runtime.choose_dtype(LAPTOP, asked)
    assert dtype is torch.float32
    assert reason.startswith("CPUs ") and f"({asked} is asked for)" in reason


def test_the_variable_decides_over_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEBOOK_DTYPE", "float32")
    assert runtime.choose_dtype(A100, "bfloat16")[0] is torch.float32


def test_the_variable_decides_the_dtype_and_is_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TUNEBOOK_DTYPE", "float16")
    dtype, reason = runtime.choose_dtype(A100)
    assert dtype is torch.float16
    assert "TUNEBOOK_DTYPE=float16" in reason


def test_a_dtype_that_is_none_of_the_three_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TUNEBOOK_DTYPE", "fp16")
    with pytest.raises(ValueError, match="is 'fp16'; expected float16, bfloat16 or"):
        runtime.choose_dtype(T4)


def test_a_gpu_too_small_is_refused_with_what_is_needed_and_offered() -> None:
    with pytest.raises(
        MemoryError, match="^the 70B model needs about 40.0 GiB .* T4 offers 14.7 GiB"
    ):
        runtime.require_memory(40.0, "the 70B model", T4)


def test_the_remedy_for_a_small_gpu_names_a_field_of_the_config() -> None:
    with pytest.raises(MemoryError, match="or weights='4bit' in the config"):
        runtime.require_memory(40.0, "the model", T4)
    assert "weights" in RunConfig.model_fields


@pytest.mark.parametrize("machine", [A100, LAPTOP])
def test_a_machine_that_can_hold_it_is_not_refused(machine: Machine) -> None:
    assert runtime.require_memory(30.0, "the model", machine) is None


@without_gpu
def test_a_machine_without_a_gpu_is_told_as_such() -> None:
    machine = runtime.find_machine()
    assert (machine.device, machine.capability) == ("cpu", None)
    assert machine.name.startswith(platform.machine())
    assert machine.memory_gb > 0.5


@pytest.mark.parametrize(
    ("variable", "place"),
    [("COLAB_RELEASE_TAG", "colab"), ("KAGGLE_KERNEL_RUN_TYPE", "kaggle")],
)
def test_a_hosted_notebook_is_known_by_its_variable(
    monkeypatch: pytest.MonkeyPatch, variable: str, place: str
) -> None:
    for name in ("COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "x")
    assert runtime.find_machine().place == place


def test_the_memory_cap_is_what_the_variable_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert runtime.memory_cap_gb() == float("inf")
    monkeypatch.setenv("TUNEBOOK_GPU_GB", "14")
    assert runtime.memory_cap_gb() == 14.0


def test_versions_are_those_installed() -> None:
    found = runtime.versions()
    assert list(found) == runtime.PACKAGES
    assert found["transformers"] == version("transformers")


def test_a_package_that_is_not_installed_is_said_to_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runtime, "PACKAGES", ["no-such-package-here"])
    assert runtime.versions() == {"no-such-package-here": "not installed"}


def test_seeding_repeats_all_three_generators() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(numpy.random.rand()), float(torch.rand(()))

    runtime.seed_everything(5)
    first = draw()
    second = draw()
    runtime.seed_everything(5)
    assert draw() == first != second


@without_gpu
def test_the_peak_memory_is_at_least_what_was_just_held() -> None:
    held = torch.ones(64 * 2**20, dtype=torch.uint8)
    assert runtime.peak_memory_gb() > held.nbytes / 2**30


def test_the_environment_is_json_and_names_dtype_engine_and_versions() -> None:
    found = json.loads(json.dumps(runtime.environment("transformers")))
    dtype = runtime.choose_dtype(runtime.find_machine())[0]
    assert found["engine"] == "transformers"
    assert f"torch.{found['dtype']}" == str(dtype)
    assert found["versions"]["torch"] == version("torch")


def test_the_description_gives_the_dtype_and_the_reason() -> None:
    dtype, reason = runtime.choose_dtype(runtime.find_machine())
    assert f"{str(dtype).removeprefix('torch.')}, because {reason}" in (
        runtime.describe()
    )


def test_the_hub_is_out_of_reach_when_offline_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with served() as endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert runtime.hub_reachable() is False


def test_the_hub_is_in_reach_when_its_address_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with served() as endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert runtime.hub_reachable() is True


def test_the_hub_is_out_of_reach_when_nothing_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with served() as endpoint:
        pass  # closed again: nobody listens there now
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert runtime.hub_reachable() is False


class served:
    """A web server on this machine for the length of a `with`."""

    def __enter__(self) -> str:
        class Quiet(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.HTTPServer(("127.0.0.1", 0), Quiet)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}"

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, "None"),
    ],
)
def test_gpu_memory_comes_in_segments_that_grow_unless_told_otherwise(
    given: dict[str, str], expected: str
) -> None:
    kept = {k: v for k, v in os.environ.items() if not k.endswith("ALLOC_CONF")}
    code = "import os, sys, helpers; print(os.environ.get('PYTORCH_ALLOC_CONF'))"
    found = subprocess.check_output(
        [sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"],
        cwd=runtime.ROOT,
        env=kept | given,
        text=True,
    )
    assert found.strip() == expected


class ColabError(Exception):
    """As `google.colab.errors.Error`."""


@pytest.fixture
def mounted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a Colab notebook is asked to mount; tests may put in an error to raise."""
    calls: list[Any] = []

    def mount(folder: str) -> None:
        if calls and isinstance(calls[0], Exception):
            raise calls[0]
        calls.append(folder)

    colab = ModuleType("google.colab")
    colab.drive = SimpleNamespace(mount=mount)
    colab.errors = SimpleNamespace(Error=ColabError)
    google = ModuleType("google")
    google.colab = colab
    monkeypatch.setitem(sys.modules, "google", google)
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.setenv("TUNEBOOK_RUNS", "")  # to be put back afterwards
    monkeypatch.delenv("TUNEBOOK_RUNS")
    return calls


ON_DRIVE = Path("/content/drive/MyDrive/tunebook/runs")


@pytest.mark.parametrize(
    ("wanted", "variable", "opened"),
    [
        (True, None, True),
        (False, None, False),
        (True, "0", False),
        (False, "1", True),
        (True, "", True),
    ],
)
def test_a_colab_notebook_keeps_its_runs_on_drive_if_it_is_told_to(
    wanted: bool,
    variable: str | None,
    opened: bool,
    mounted: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if variable is not None:
        monkeypatch.setenv("TUNEBOOK_DRIVE", variable)
    runtime.open_drive(wanted)
    assert mounted == (["/content/drive"] if opened else [])
    assert runs.runs_folder() == (ON_DRIVE if opened else runtime.ROOT / "runs")


def test_drive_is_not_opened_outside_colab(
    mounted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "google.colab")
    runtime.open_drive(True)
    assert mounted == []
    assert runs.runs_folder() == runtime.ROOT / "runs"


def test_listing_runs_does_not_open_drive_by_itself(
    mounted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNEBOOK_DRIVE", "1")
    assert runs.runs_folder() == runtime.ROOT / "runs"
    assert mounted == []


def test_a_folder_of_runs_that_is_named_stays_although_drive_is_wanted(
    mounted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNEBOOK_RUNS", "/elsewhere")
    runtime.open_drive(True)
    assert (mounted, runs.runs_folder()) == ([], Path("/elsewhere"))


def test_the_first_cell_run_again_without_drive_leaves_it(mounted: list[str]) -> None:
    runtime.open_drive(True)
    runtime.open_drive(True)
    assert runs.runs_folder() == ON_DRIVE
    runtime.open_drive(False)
    assert runs.runs_folder() == runtime.ROOT / "runs"


@pytest.mark.parametrize("error", [ColabError("denied"), ValueError("mount failed")])
def test_a_drive_that_does_not_open_stops_the_first_cell_and_says_what_to_do(
    error: Exception, mounted: list[Any]
) -> None:
    mounted.append(error)
    with pytest.raises(RuntimeError, match=rf"\({error}\).*KEEP_ON_DRIVE = False"):
        runtime.open_drive(True)
    assert runs.runs_folder() == runtime.ROOT / "runs"


def test_an_unknown_value_of_the_drive_variable_is_refused(
    mounted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNEBOOK_DRIVE", "yes")
    with pytest.raises(ValueError, match="TUNEBOOK_DRIVE is 'yes'; expected 1 .* or 0"):
        runtime.open_drive(True)


def test_the_first_cell_asks_for_drive_before_anything_is_installed() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(runtime.ROOT)!r})\n"
        "from helpers import install, runtime; runtime.open_drive(True)"
    )
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)
