"""The machine, its dtype with the reason, the engine, and a notebook's first cell."""

from __future__ import annotations

import gc
import importlib.util
import json
import logging
import os
import platform
import sys
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from helpers.errors import ModelError, TunebookError
from helpers.install import installed_version

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
Engine = Literal["unsloth", "transformers"]

# the folder that `helpers` is in: the project's, or site-packages
ROOT = Path(__file__).resolve().parent.parent
INSTALLED = not (ROOT / "pyproject.toml").exists()
DRIVE = Path("/content/drive")  # where Colab shows Google Drive
PACKAGES = "torch transformers trl peft bitsandbytes datasets accelerate unsloth"
# on import these warn of GPU kernels that a CPU machine has no use for
CHATTY = ("torchao", "torch.utils._pytree", "bitsandbytes")


class Machine(NamedTuple):
    """The machine that a run is on."""

    place: str  # colab, kaggle or local
    device: str  # cuda or cpu
    name: str  # the GPU's, or the processor's architecture and core count
    memory_gb: float  # GiB of GPU memory that torch may use (RAM without a GPU)
    capability: tuple[int, int] | None  # CUDA's, (7, 5) on a T4


def find_machine() -> Machine:
    """Returns the machine this Python runs on."""
    import psutil
    import torch

    colab = "google.colab" in sys.modules or "COLAB_RELEASE_TAG" in os.environ
    kaggle = "KAGGLE_KERNEL_RUN_TYPE" in os.environ
    place = "colab" if colab else "kaggle" if kaggle else "local"
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        gb = min(card.total_memory / 2**30, memory_cap_gb())
        return Machine(place, "cuda", card.name, gb, (card.major, card.minor))
    name = f"{platform.machine()}, {os.cpu_count()} cores"
    return Machine(place, "cpu", name, psutil.virtual_memory().total / 2**30, None)


def memory_cap_gb() -> float:
    """Returns the GiB of GPU memory that a run may use (`TUNEBOOK_GPU_GB`), or inf."""
    return float(os.environ.get("TUNEBOOK_GPU_GB", "inf"))


def choose_dtype(machine: Machine, wanted: str = "auto") -> tuple[torch.dtype, str]:
    """Returns the dtype of arithmetic on a machine, and the reason for it.

    `torch.cuda.is_bf16_supported()` says True on a T4, which only emulates bf16: the
    compute capability decides instead. `TUNEBOOK_DTYPE` overrides it all.
    """
    import torch

    if forced := os.environ.get("TUNEBOOK_DTYPE"):
        return getattr(torch, forced), f"TUNEBOOK_DTYPE={forced} asks for it"
    if machine.capability is None:
        return torch.float32, "CPUs without 16-bit units are 6 to 60 times slower in it"
    has_bf16 = machine.capability >= (8, 0)
    if wanted == "float16" or (wanted == "bfloat16" and has_bf16):
        return getattr(torch, wanted), f"the config asks for dtype={wanted!r}"
    if has_bf16:
        return torch.bfloat16, "compute capability 8.0 or newer has bf16 units"
    number = ".".join(map(str, machine.capability))
    reason = f"compute capability {number} has no bf16 units (they start at 8.0)"
    return torch.float16, reason


def prepare_device() -> Machine:
    """Returns the machine, after applying the memory cap of `TUNEBOOK_GPU_GB`."""
    import torch

    machine = find_machine()
    if machine.device == "cuda" and memory_cap_gb() < float("inf"):
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory_cap_gb() / total))
        # a capped GPU stands in for a T4, which has neither kind of attention
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
    return machine


def peak_memory_gb() -> float:
    """Returns the peak in GiB: reserved by torch on a GPU, else resident."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**30
    import resource  # Windows has none

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def free_memory() -> None:
    """Gives memory of deleted models back, so that the next one fits."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def seed_everything(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's generators, the GPU's included."""
    from transformers import set_seed

    set_seed(seed)


def environment(engine: str, dtype: str = "auto") -> dict[str, Any]:
    """Returns the machine's part of `report.json`, for a config's engine and dtype."""
    machine = find_machine()
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "place": machine.place,
        "engine": engine,
        "device": f"{machine.device}: {machine.name}",
        "memory_gb": round(machine.memory_gb, 2),
        "dtype": str(choose_dtype(machine, dtype)[0]).removeprefix("torch."),
        "versions": {n: str(installed_version(n)) for n in PACKAGES.split()},
    }


def home() -> Path:
    """Returns the folder of `runs/` and `data_samples/`: the project's, or this one."""
    return Path.cwd() if INSTALLED else ROOT


def find_local(path: str) -> Path | None:
    """Returns what a relative path names: here, or beside `runs/`; None if nothing."""
    places = (folder / path for folder in (Path.cwd(), home()))
    return next((place for place in places if place.exists()), None)


def runs_folder() -> Path:
    """Returns the folder of all runs: `TUNEBOOK_RUNS`, else `runs/` at `home()`."""
    return Path(os.environ.get("TUNEBOOK_RUNS") or home() / "runs")


def current_run() -> str | None:
    """Returns the name of the run to open: `TUNEBOOK_RUN`, else the one saved last."""
    current = runs_folder() / "current"
    saved = current.read_text(encoding="utf-8").strip() if current.exists() else None
    return os.environ.get("TUNEBOOK_RUN") or saved


def resolve_engine(engine: str) -> Engine:
    """Returns the engine that `auto` means here, or the one named, if installed."""
    installed = importlib.util.find_spec("unsloth") is not None
    if engine == "auto":
        import torch

        return "unsloth" if installed and torch.cuda.is_available() else "transformers"
    if engine == "unsloth" and not installed:
        raise ModelError("Unsloth is not installed: run `make setup`, or set engine")
    return engine  # type: ignore[return-value]


def start(engine: str | None = None) -> None:
    """Prepares a notebook or a command, and logs the machine; may be called again.

    Unsloth patches TRL, PEFT and transformers, so it is imported here, before them,
    where it is the `engine`, by default the current run's.
    """
    # Memory of a GPU in segments that grow: lengths change from step to step, and the
    # blocks kept for each of them fill it (demo-gpu reserved 13 GiB without, 5.6 with).
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    library = logging.getLogger("helpers")
    if not library.handlers:
        library.addHandler(StdoutHandler())
        library.setLevel(logging.INFO)
        library.propagate = False  # Colab's root logger would show it a second time
    if not engine:
        path = runs_folder() / str(current_run()) / "config.json"
        with suppress(OSError, ValueError, KeyError):  # who opens the run says it
            engine = json.loads(path.read_text(encoding="utf-8"))["engine"]
    with suppress(ModelError):  # not installed: whoever loads a model says so
        if resolve_engine(engine or "auto") == "unsloth":
            import unsloth  # noqa: F401
    machine = prepare_device()
    dtype, reason = choose_dtype(machine)
    place, device, name, gb, _ = machine
    log.info(f"{place}, {device}: {name}, {gb:.1f} GiB")
    log.info(f"{str(dtype).removeprefix('torch.')}, because {reason}")
    log.info(", ".join(f"{n} {installed_version(n)}" for n in PACKAGES.split()))
    log.info(f"runs are kept in {runs_folder()}")


class StdoutHandler(logging.Handler):
    """Writes messages to the stdout of the moment, which notebooks replace."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one message."""
        sys.stdout.write(self.format(record) + "\n")
        sys.stdout.flush()


def hub_reachable(timeout_s: float = 3.0) -> bool:
    """Returns whether the model hub answers (never, when `HF_HUB_OFFLINE` is set)."""
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return False
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    with suppress(OSError):
        urllib.request.urlopen(endpoint, timeout=timeout_s).close()
        return True
    return False


def open_drive(wanted: bool) -> None:
    """Keeps a Colab notebook's runs on Google Drive, which outlives the machine.

    The folder goes into `TUNEBOOK_RUNS`; where that is set already, or `TUNEBOOK_DRIVE`
    is 0, nothing happens.
    """
    folder = str(DRIVE / "MyDrive" / "tunebook" / "runs")
    if os.environ.get("TUNEBOOK_RUNS") == folder:  # the cell was run before
        del os.environ["TUNEBOOK_RUNS"]
    wanted = wanted and os.environ.get("TUNEBOOK_DRIVE") != "0"
    if not wanted or "TUNEBOOK_RUNS" in os.environ or "google.colab" not in sys.modules:
        return
    from google.colab import drive, errors

    try:
        drive.mount(str(DRIVE))
    except (ValueError, errors.Error) as error:
        raise TunebookError(
            f"Google Drive was not opened ({error}). Run this cell again and allow it, "
            "or set KEEP_ON_DRIVE = False: runs are then lost with this machine"
        ) from error
    os.environ["TUNEBOOK_RUNS"] = folder
