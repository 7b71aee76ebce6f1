"""Says what machine this is, which dtype to use and why, and seeds everything."""

from __future__ import annotations

import logging
import os
import platform
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

# the folder that `helpers` is in: the project's, or site-packages
ROOT = Path(__file__).resolve().parent.parent
INSTALLED = not (ROOT / "pyproject.toml").exists()
DRIVE = Path("/content/drive")  # where Colab shows Google Drive
PACKAGES = ["torch", "transformers", "trl", "peft", "bitsandbytes", "datasets"]
PACKAGES += ["accelerate", "unsloth", "ipywidgets"]


class Machine(NamedTuple):
    """What a run needs to know of the machine it is on."""

    place: str
    """`colab`, `kaggle` or `local`."""
    device: str
    """`cuda` or `cpu`."""
    name: str
    """The GPU's name, or the processor's architecture and core count."""
    memory_gb: float
    """GiB of GPU memory that torch may use (RAM on a CPU machine)."""
    capability: tuple[int, int] | None
    """CUDA compute capability, (7, 5) on a T4; None without a GPU."""


def find_machine() -> Machine:
    """Returns the machine this Python runs on."""
    import psutil
    import torch

    place = "local"
    if "google.colab" in sys.modules or "COLAB_RELEASE_TAG" in os.environ:
        place = "colab"
    elif "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        place = "kaggle"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        capability = torch.cuda.get_device_capability(0)
        gb = min(properties.total_memory / 2**30, memory_cap_gb())
        return Machine(place, "cuda", properties.name, gb, capability)
    name = f"{platform.machine()}, {os.cpu_count()} cores"
    return Machine(place, "cpu", name, psutil.virtual_memory().total / 2**30, None)


def memory_cap_gb() -> float:
    """Returns the GiB of GPU memory that a run may use (`TUNEBOOK_GPU_GB`), or inf.

    With the variable at 14, a large GPU stands in for a T4 as far as memory goes.
    """
    return float(os.environ.get("TUNEBOOK_GPU_GB", "inf"))


def choose_dtype(machine: Machine, asked: str = "auto") -> tuple[torch.dtype, str]:
    """Returns the dtype of arithmetic on this machine, and the reason for it.

    `torch.cuda.is_bf16_supported()` says True on a T4, which only emulates bf16: the
    compute capability decides instead. `TUNEBOOK_DTYPE=float16` overrides it all.

    Args:
        machine: from `find_machine`.
        asked: `auto`, `float16` or `bfloat16`, where the machine has units.
    """
    import torch

    forced = os.environ.get("TUNEBOOK_DTYPE")
    if forced:
        if forced not in ("float16", "bfloat16", "float32"):
            raise ValueError(
                f"TUNEBOOK_DTYPE is {forced!r}; expected float16, bfloat16 or float32"
            )
        return getattr(torch, forced), f"TUNEBOOK_DTYPE={forced} asks for it"
    if machine.capability is None:
        instead = "" if asked == "auto" else f" ({asked} is asked for)"
        reason = "CPUs without bf16 units are 6 to 60 times slower in it"
        if asked == "float16":
            reason = "CPUs have no fp16 units"
        return torch.float32, reason + instead
    has_bf16 = machine.capability >= (8, 0)
    if asked == "float16" or (asked == "bfloat16" and has_bf16):
        return getattr(torch, asked), f"the config asks for dtype={asked!r}"
    if has_bf16:
        return torch.bfloat16, "compute capability 8.0 or newer has bf16 units"
    instead = "" if asked == "auto" else f"; {asked} is asked for"
    return (
        torch.float16,
        f"compute capability {machine.capability[0]}.{machine.capability[1]} "
        f"has no bf16 units (they start at 8.0{instead})",
    )


def prepare_device() -> Machine:
    """Returns the machine, after applying the memory cap of `TUNEBOOK_GPU_GB`.

    With a cap a newer GPU stands in for a T4, which has neither FlashAttention nor
    cuDNN attention: both are switched off with it.
    """
    import torch

    machine = find_machine()
    if machine.device == "cuda" and memory_cap_gb() < float("inf"):
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory_cap_gb() / total))
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
    return machine


def require_memory(needed_gb: float, what: str, machine: Machine | None = None) -> None:
    """Raises MemoryError when the GPU cannot hold what is about to be loaded.

    Args:
        needed_gb: GiB that are needed at the least.
        what: the thing that needs them, for the message.
        machine: the machine to judge; this one by default.
    """
    machine = machine or find_machine()
    if machine.device == "cuda" and machine.memory_gb < needed_gb:
        raise MemoryError(
            f"{what} needs about {needed_gb:.1f} GiB of GPU memory; "
            f"{machine.name} offers {machine.memory_gb:.1f} GiB. Choose a smaller "
            "model, or weights='4bit' in the config."
        )


def peak_memory_gb() -> float:
    """Returns the most memory this process has held, in GiB.

    On a GPU the peak of torch's reserved memory (the CUDA context comes on top),
    elsewhere the peak resident size of the process.
    """
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**30
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def free_memory() -> None:
    """Gives memory of deleted models back, so that the next one fits."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def seed_everything(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's generators, the GPU's included."""
    from transformers import set_seed

    set_seed(seed)


def versions() -> dict[str, str]:
    """Returns `{package: version}` of the stack as installed here."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def environment(engine: str, dtype: str = "auto") -> dict[str, Any]:
    """Returns what `report.json` says of the machine.

    Args:
        engine: `unsloth` or `transformers`.
        dtype: the one that the config asks for.
    """
    machine = find_machine()
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "place": machine.place,
        "engine": engine,
        "device": f"{machine.device}: {machine.name}",
        "memory_gb": round(machine.memory_gb, 2),
        "dtype": str(choose_dtype(machine, dtype)[0]).removeprefix("torch."),
        "versions": versions(),
    }


def home() -> Path:
    """Returns the folder of `runs/` and `data_samples/`.

    The project's own, or the working folder where the helpers were installed by pip.
    """
    return Path.cwd() if INSTALLED else ROOT


def describe() -> str:
    """Returns one paragraph on this machine, for a notebook's first output."""
    machine = prepare_device()
    dtype, reason = choose_dtype(machine)
    return (
        f"{machine.place}, {machine.device}: {machine.name}, "
        f"{machine.memory_gb:.1f} GiB\n"
        f"{str(dtype).removeprefix('torch.')}, because {reason}\n"
        + ", ".join(f"{k} {v}" for k, v in versions().items())
    )


def start() -> None:
    """Prints what machine this is, and has a notebook show our errors as sentences.

    An error that helpers raise on purpose says what to do; the twenty frames above it
    do not. The cell fails all the same, and other errors keep their traceback.
    """
    # Memory of a GPU in segments that grow: lengths change from step to step, and blocks
    # kept for each of them fill it (demo-gpu reserved 13 GiB without, 5.6 with).
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # on import these warn of GPU kernels that a CPU machine has no use for
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    print(describe())  # noqa: T201
    if folder := os.environ.get("TUNEBOOK_RUNS"):
        print(f"runs are kept in {folder}")  # noqa: T201
    try:
        shell: Any = get_ipython()  # type: ignore[name-defined]  # noqa: F821
    except NameError:
        return

    def show(
        shell: Any, kind: type, error: BaseException, trace: Any, tb_offset: Any = None
    ) -> None:
        place = traceback.extract_tb(trace)[-1]
        if not Path(place.filename).is_relative_to(ROOT / "helpers"):
            shell.showtraceback((kind, error, trace), tb_offset=tb_offset)
            return
        where = f"({Path(place.filename).relative_to(ROOT)}, line {place.lineno})"
        shell._showtraceback(kind, error, [f"{kind.__name__}: {error}\n{where}"])

    shell.set_custom_exc((ValueError, FileNotFoundError, MemoryError), show)


@contextmanager
def exit_on(*kinds: type[Exception]) -> Iterator[None]:
    """Ends a command line with one line on an error of these kinds.

    Raises:
        SystemExit: something that the user can mend is wrong; the message says what.
    """
    try:
        yield
    except kinds as error:
        sys.exit(f"{type(error).__name__}: {error}")


def hub_reachable(timeout_s: float = 3.0) -> bool:
    """Returns whether the model hub answers (never, when `HF_HUB_OFFLINE` is set)."""
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return False
    import urllib.request

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(endpoint, timeout=timeout_s).close()
    except OSError:
        return False
    return True


def open_drive(wanted: bool) -> None:
    """Keeps the runs of a Colab notebook on Google Drive, asking the user for access.

    A lost Colab machine takes its disk along; Drive stays. The folder goes into
    `TUNEBOOK_RUNS`, so that all commands of this notebook use it. Outside Colab, and
    where the user has set that variable, nothing happens.

    Args:
        wanted: whether to; the variable `TUNEBOOK_DRIVE` (1 or 0) overrides it.

    Raises:
        RuntimeError: Drive could not be opened, or the user refused.
        ValueError: `TUNEBOOK_DRIVE` is neither 1 nor 0.
    """
    override = os.environ.get("TUNEBOOK_DRIVE", "")
    if override not in ("", "0", "1"):
        raise ValueError(
            f"TUNEBOOK_DRIVE is {override!r}; expected 1 (keep runs on Google Drive) "
            "or 0 (keep them on this machine)"
        )
    folder = str(DRIVE / "MyDrive" / "tunebook" / "runs")
    if os.environ.get("TUNEBOOK_RUNS") == folder:  # the cell was run before
        del os.environ["TUNEBOOK_RUNS"]
    refused = override == "0" or not (wanted or override)
    if refused or "TUNEBOOK_RUNS" in os.environ or "google.colab" not in sys.modules:
        return
    from google.colab import drive, errors

    try:
        drive.mount(str(DRIVE))
    except (ValueError, errors.Error) as error:
        raise RuntimeError(
            f"Google Drive was not opened ({error}). Run this cell again and allow it, "
            "or set KEEP_ON_DRIVE = False: runs then lie on this machine's disk and "
            "are lost with it"
        ) from error
    os.environ["TUNEBOOK_RUNS"] = folder
