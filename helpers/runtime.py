"""The machine, its dtype with the reason, the engine, a first cell, several GPUs."""

import gc
import importlib.util
import inspect
import json
import logging
import os
import platform
import re
import subprocess
import sys
import tempfile
import urllib.request
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from helpers.errors import ConfigError, ModelError, TrainingError, TunebookError
from helpers.install import ROOT, installed_version

log = logging.getLogger(__name__)
HOME = ROOT if (ROOT / "pyproject.toml").exists() else Path.cwd()  # of runs/ and data
ON_DRIVE = "/content/drive/MyDrive/tunebook/runs"
PROBE = "/openai-community/gpt2/resolve/main/config.json"  # a small public file
SET = set[str]()  # variables of the environment, by `keep_runs`
PACKAGES = "torch transformers trl peft bitsandbytes datasets accelerate unsloth"
# accelerate's words for FSDP2 with a unit for each decoder layer
SHARD = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
SHARD |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
# CUDA starts, and sees what it is shown, only once a GPU has been chosen
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


class Machine(NamedTuple):
    device: str  # cuda or cpu
    name: str  # the GPU's, or the processor's architecture and core count
    memory_gb: float  # GiB of GPU memory that torch may use (RAM without a GPU)
    capability: tuple[int, int] | None  # CUDA's, (7, 5) on a T4


def find_machine() -> Machine:
    """Returns this machine, its GPU under the memory cap of `TUNEBOOK_GPU_GB`."""
    import psutil
    import torch

    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties()
        total_gb, cap_gb = card.total_memory / 2**30, memory_cap_gb()
        gb = min(total_gb, cap_gb)
        if cap_gb < float("inf"):
            torch.cuda.set_per_process_memory_fraction(gb / total_gb)
            # a capped GPU stands in for a T4, which has neither kind of attention
            torch.backends.cuda.enable_flash_sdp(False)
            torch.backends.cuda.enable_cudnn_sdp(False)
        return Machine("cuda", card.name, gb, (card.major, card.minor))
    name = f"{platform.machine()}, {os.cpu_count()} cores"
    return Machine("cpu", name, psutil.virtual_memory().total / 2**30, None)


def memory_cap_gb() -> float:
    text = os.environ.get("TUNEBOOK_GPU_GB", "inf")
    if not re.fullmatch(r"inf|[1-9]\d*(\.\d+)?", text):
        raise ConfigError(f"TUNEBOOK_GPU_GB={text}: expected GiB, a number like 14.5")
    return float(text)


def choose_dtype(machine: Machine, wanted: str = "auto") -> tuple[Any, str]:
    """Returns the dtype of arithmetic on a machine, and the reason for it."""
    import torch

    if name := os.environ.get("TUNEBOOK_DTYPE"):
        if name not in ("float16", "bfloat16", "float32"):
            raise ConfigError(f"TUNEBOOK_DTYPE={name}: not float16, bfloat16, float32")
        return getattr(torch, name), f"TUNEBOOK_DTYPE={name} asks for it"
    if machine.capability is None:
        return torch.float32, "16-bit arithmetic is 6 to 60 times slower on most CPUs"
    if wanted == "float16":
        return torch.float16, "the config asks for dtype='float16'"
    # torch.cuda.is_bf16_supported() says True on a T4, which only emulates it
    if machine.capability >= (8, 0):
        return torch.bfloat16, "compute capability 8.0 or newer has bf16 units"
    reason = "compute capability {}.{} has no bf16 units (they start at 8.0)"
    return torch.float16, reason.format(*machine.capability)


def count_processes() -> int:
    """Returns how many processes a launcher has started for one training run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_sharded() -> bool:
    """Returns whether the processes share the weights: `--shard`, or a launcher."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def first_process() -> AbstractContextManager[Any]:
    """Has the first of several processes go through a block before the others."""
    if count_processes() == 1:
        return nullcontext()
    import torch
    from accelerate import PartialState

    options: Any = {"cpu": not torch.cuda.is_available(), "timeout": timedelta(hours=2)}
    return PartialState(**options).main_process_first()


def choose_gpu() -> None:
    """Gives a process one GPU: its own of several processes, else the first."""
    import torch

    if (count := torch.cuda.device_count()) and count_processes() > 1:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    elif count > 1:
        every = ",".join(map(str, range(count)))
        every = os.environ.get("CUDA_VISIBLE_DEVICES") or every
        os.environ["TUNEBOOK_GPUS"] = every  # for `launch`
        os.environ["CUDA_VISIBLE_DEVICES"] = every.partition(",")[0]
        text = "`python -m helpers train RUN --gpus all` trains on all"
        log.info(f"one of {count} GPUs is used here; {text}")


def launch(arguments: list[str], gpus: str = "all", shard: bool = False) -> None:
    """Runs `python -m helpers` in a process for each GPU, by torch's launcher.

    With `shard` the processes share the frozen weights; see docs/scaling.md.
    """
    import torch
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    every = os.environ.get("TUNEBOOK_GPUS")  # of a notebook's kernel, which sees one
    here = len(every.split(",")) if every else torch.cuda.device_count()
    if os.environ.get("ACCELERATE_USE_CPU"):  # a dry run, whose processes share it
        here = os.cpu_count() or 1
    if not here:
        raise ConfigError("--gpus: there is no GPU; without it the CPU trains")
    number = str(here) if gpus == "all" else gpus
    count = int(number) if number.isdigit() else 0
    if not 1 <= count <= here:
        raise ConfigError(f"--gpus {gpus}: expected all, or a number from 1 to {here}")
    if count == 1 and shard:
        raise ConfigError("--shard needs two GPUs or more; this machine has one")
    if count == 1:
        return
    # else a traceback for each process that ends
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    variables = {"OMP_NUM_THREADS": str((os.cpu_count() or 1) // count or 1)}
    variables |= os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    variables |= {"CUDA_VISIBLE_DEVICES": every} if every else {}
    variables |= SHARD if shard else {}
    files = ",".join(f"{rank}:3" for rank in range(1, count))  # for what others print
    with tempfile.TemporaryDirectory() as logs, patch.dict(os.environ, variables):
        options = ["--standalone", f"--nproc-per-node={count}", "--log-dir", logs]
        options += ["--redirects", files, "-m", "helpers"]
        try:
            run.run(run.parse_args([*options, *arguments]))
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            text = f"process {rank} of {count} ended with exit code {failure.exitcode}"
            for file in Path(logs).glob(f"*/attempt_0/{rank}/stderr.log"):
                lines = [x for x in file.read_text().splitlines() if "Error" in x]
                text += "".join(f" ({line})" for line in lines[-1:])
            text += ", so all were stopped: the same command goes on from the last"
            raise TrainingError(f"{text} checkpoint") from None


def peak_memory_gb() -> float:
    """Returns the peak in GiB: reserved by torch on a GPU, else resident."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**30
    try:
        import resource
    except ImportError:  # on Windows
        import psutil

        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss) / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def free_memory() -> None:
    import torch

    gc.collect()  # of deleted models, so that the next one fits
    torch.cuda.empty_cache()


def in_notebook() -> bool:
    shell = sys.modules.get("IPython")  # this file is read before anything is installed
    return shell is not None and hasattr(shell.get_ipython(), "kernel")


def progress(items: Any, what: str, *, total: int | None = None, done: int = 0) -> Any:
    """Returns a bar of count and time left over items, or by its `update` over None.

    It is gone at its end. Where nobody looks there is none: in files, and under
    TQDM_DISABLE, as in executed copies of notebooks.
    """
    from tqdm.auto import tqdm

    options: Any = {"desc": what, "total": total, "initial": done, "leave": False}
    if not (in_notebook() or "TQDM_DISABLE" in os.environ):
        options["disable"] = None  # unless stderr is a terminal
    if items is None and total is None:
        options["bar_format"] = "{desc}: {elapsed}{postfix}"
    return tqdm(items, **options)


def run_command(command: list[str], what: str, text: str = "", **options: Any) -> str:
    """Returns what a program prints; its time and last words are shown meanwhile.

    Raises:
        ModelError: it fails, with the last error that it tells.
    """
    options |= dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    options |= {"text": True, "errors": "replace"}
    with tempfile.TemporaryFile() as file, progress(None, what) as bar:
        file.write(text.encode())  # `communicate` would send a part before its timeout
        file.seek(0)
        process = subprocess.Popen(command, stdin=file, **options)
        try:
            while process.returncode is None:
                try:
                    output, errors = process.communicate(timeout=0.5)
                except subprocess.TimeoutExpired as running:
                    lines = re.split(rb"[\r\n]+", (running.stderr or b"").strip())
                    bar.set_postfix_str(lines[-1][:60].decode(errors="replace"))
        finally:
            process.kill()  # if it was interrupted
    if process.returncode:
        texts = errors.strip().splitlines() or [f"exit code {process.returncode}"]
        is_error = re.compile(r"(?i)[\w.]*error\b|\s*×").match  # uv's
        first = max((n for n, x in enumerate(texts) if is_error(x)), default=-1)
        reason = " ".join(" ".join(texts[first:]).split())
        raise ModelError(f"{what} fails: {reason[:400]}")
    return output


def run_alone(
    function: Callable[..., Any],
    *arguments: Any,
    requirements: list[str] | None = None,
    environment: dict[str, str] | None = None,
) -> Any:
    """Returns a function's value from a process that has nothing of this project.

    The function imports in its body what it uses. Arguments are what JSON has, and
    functions that it calls. `requirements` are installed apart from this environment.
    """
    values = json.dumps([value for value in arguments if not callable(value)])
    sources = [inspect.getsource(f) for f in (*arguments, function) if callable(f)]
    command, head = [sys.executable, "-"], list[str]()
    apart = {"PYTHONSAFEPATH": "1"}
    if requirements:
        apart["PYTHONPATH"] = ""
        command = [sys.executable, "-m", "uv", "run", "--no-project"]
        command += ["--python", sys.executable, "--script", "-"]
        head = ["# /// script", f"# dependencies = {json.dumps(requirements)}", "# ///"]
    head.append("from __future__ import annotations")
    call = f"value = {function.__name__}(*json.loads({values!r}))"
    dump = "print(); print(json.dumps(value, default=lambda number: number.item()))"
    script = "\n".join([*head, *sources, "import json", call, dump])
    variables = os.environ | apart | (environment or {})
    what = function.__name__.replace("_", " ")
    output = run_command(command, what, script, env=variables)
    return json.loads(output.splitlines()[-1])


def environment(engine: str, dtype: str = "auto") -> dict[str, Any]:
    machine = find_machine()
    return {
        "python": platform.python_version(),
        "engine": resolve_engine(engine),
        "device": f"{machine.device}: {machine.name}",
        "memory_gb": round(machine.memory_gb, 2),
        "dtype": str(choose_dtype(machine, dtype)[0]).removeprefix("torch."),
        "versions": {name: str(installed_version(name)) for name in PACKAGES.split()},
    }


def find_local(path: str) -> Path | None:
    places = (folder / path for folder in (Path.cwd(), HOME))
    return next((place for place in places if place.exists()), None)


def runs_folder() -> Path:
    return Path(os.environ.get("TUNEBOOK_RUNS") or HOME / "runs")


def current_run() -> str:
    name, file = os.environ.get("TUNEBOOK_RUN"), runs_folder() / "current"
    return name or (file.read_text("utf-8").strip() if file.exists() else "")


def resolve_engine(engine: str) -> str:
    """Returns the engine that `auto` means here, or the one named, if installed."""
    installed = importlib.util.find_spec("unsloth") is not None
    if engine == "auto":
        import torch

        usable = installed and torch.cuda.is_available() and not is_sharded()
        return "unsloth" if usable else "transformers"
    if engine == "unsloth" and not installed:
        raise ModelError("Unsloth is not installed: run `make setup`, or set engine")
    return engine


def show_messages() -> None:
    library = logging.getLogger("helpers")
    library.handlers = [logging.StreamHandler(sys.stdout)]
    library.setLevel("INFO" if os.environ.get("RANK", "0") == "0" else "ERROR")
    library.propagate = False  # Colab's root logger would show it a second time


def start(engine: str | None = None) -> None:
    """Prepares a notebook or a command for an engine, by default the current run's."""
    # lengths change from step to step; blocks for each took 13 GiB in the demo, not 5.6
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if not (in_notebook() or sys.stderr.isatty()):
        os.environ.setdefault("TQDM_DISABLE", "1")  # no library's bars in a log file
    # on import these warn of GPU kernels that a CPU machine has no use for
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    show_messages()
    import pandas as pd

    pd.set_option("display.max_colwidth", None)  # a sentence in a table is shown whole
    choose_gpu()
    path = runs_folder() / (current_run() or "none") / "config.json"
    with suppress(OSError, ValueError, AttributeError):  # whoever opens it says so
        engine = engine or json.loads(path.read_text("utf-8")).get("engine")
    with suppress(ModelError):  # not installed: whoever loads a model says so
        if resolve_engine(engine or "auto") == "unsloth":
            warnings.filterwarnings("ignore", "Unsloth: detected a manual")  # mended
            # it patches TRL, PEFT and transformers, so it comes before them
            import unsloth  # noqa: F401
    machine = find_machine()
    dtype, reason = choose_dtype(machine)
    log.info(f"{machine.device}: {machine.name}, {machine.memory_gb:.1f} GiB")
    log.info(f"{str(dtype).removeprefix('torch.')}, because {reason}")
    log.info(", ".join(f"{n} {installed_version(n)}" for n in PACKAGES.split()))
    log.info(f"runs are kept in {runs_folder()}")


@cache
def hub_reachable() -> bool:
    """Returns whether the hub answers, asked once; else libraries use their caches."""
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return False
    # a file: they may hang while pages answer
    file = os.environ.get("HF_ENDPOINT", "https://huggingface.co") + PROBE
    try:
        urllib.request.urlopen(file, timeout=3.0).close()
        return True
    except (OSError, ValueError) as error:  # the latter for what is no address
        if getattr(error, "code", 500) < 500:  # a refusal is an answer
            return True
    import huggingface_hub.constants

    os.environ["HF_HUB_OFFLINE"] = "1"  # else they ask for each file, for minutes
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    return False


def keep_runs(place: str) -> None:
    """Keeps a notebook's work where it outlives the machine.

    Args:
        place: `drive`, on Colab; `hub:owner/name`, a private repository to which
            checkpoints are copied, made if need be; or empty.

    Raises:
        ConfigError, TunebookError: another place, no token, or Drive does not open.
    """
    while SET:  # the cell was run before, perhaps with another place
        os.environ.pop(SET.pop(), None)
    if place.startswith("hub:"):
        from huggingface_hub import get_token  # which asks Colab's secrets, too

        if not (token := get_token()):
            raise ConfigError(f"KEEP = {place!r} needs HF_TOKEN, on Colab a secret")
        SET.add("TUNEBOOK_KEEP")
        os.environ |= {"TUNEBOOK_KEEP": place, "HF_TOKEN": token}
    elif place not in ("", "drive"):
        raise ConfigError(f"KEEP = {place!r}: expected 'drive', 'hub:owner/name' or ''")
    on_colab = "google.colab" in sys.modules
    if place != "drive" or "TUNEBOOK_RUNS" in os.environ or not on_colab:
        return
    from google.colab import drive, errors

    try:
        drive.mount("/content/drive")
    except (ValueError, errors.Error) as error:
        remedy = "allow it, or set KEEP = '': runs then go with the machine"
        raise TunebookError(f"Drive was not opened ({error}); {remedy}") from error
    SET.add("TUNEBOOK_RUNS")
    os.environ["TUNEBOOK_RUNS"] = ON_DRIVE
