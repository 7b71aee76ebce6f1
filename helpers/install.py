"""Installs the stack beside a torch that is there; needs the standard library only."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STACK = ROOT / "requirements.txt"
UNSLOTH = ROOT / "requirements-unsloth.txt"
CORE = ("torch", "transformers", "trl", "peft", "datasets")
REPLACED = ("datasets", "pyarrow", "fsspec", "torchao")  # what changes on Colab
# replacing one of these under a running Colab kernel breaks it, so pip may not
KEPT = ("torch", "torchvision", "numpy", "ipywidgets", "ipython", "ipykernel")


def installed_version(package: str) -> str | None:
    return next((place.version for place in distributions(name=package)), None)


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "-qq", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        remedy = "Check the network and the disk space, then run it again"
        raise SystemExit(f"pip install {' '.join(arguments)} failed:\n{tail}\n{remedy}")


def constraints() -> list[str]:
    versions = {name: installed_version(name) for name in KEPT}
    return [f"{name}=={version}" for name, version in versions.items() if version]


def extra(*names: str) -> None:
    """Installs requirement files whose packages are not all there as pinned."""
    for path in (ROOT / name for name in names):
        text = path.read_text(encoding="utf-8")
        pins = re.findall(r"^([\w.-]+)==([\w.]+)", text, re.M)
        if any(installed_version(name) != version for name, version in pins):
            # where one package has hashes, pip wants them of all in the call
            pinned = ["--no-deps", "--require-hashes"]
            pip(f"-r{path}", *(pinned if "--hash" in text else constraints()))


def install(*names: str) -> None:
    """Installs what is missing of the stack and of more requirement files."""
    for path in (ROOT / name for name in names):
        if not path.exists():
            raise SystemExit(f"no {path}: name a requirement file of the project")
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        number = ".".join(map(str, sys.version_info[:3]))
        remedy = "name another: make setup PYTHON=python3.12"
        raise SystemExit(f"Python {number} found, 3.11 to 3.13 were tested; {remedy}")
    if not STACK.exists():
        raise SystemExit(f"no {STACK}: run this in a clone of the repository")
    sys.stdout.write("installs what is missing; the first time takes minutes\n")
    sys.stdout.flush()
    if not (installed_version("torch") or shutil.which("nvidia-smi")):
        # without CUDA's gigabytes; only uv knows where PyTorch keeps it
        pip("uv")
        command = [sys.executable, "-m", "uv", "pip", "install", "-q", "torch"]
        command += ["-c", str(STACK), "--python", sys.executable]
        # where uv reaches nothing, pip takes what it is set up to find
        subprocess.run([*command, "--torch-backend", "cpu"], capture_output=True)
    hashed = [name for name in names if "--hash" in (ROOT / name).read_text("utf-8")]
    plain = [ROOT / name for name in names if name not in hashed]
    pip(*(f"-r{path}" for path in (STACK, *plain)), *constraints())
    pip("--no-deps", f"-r{UNSLOTH}")
    extra(*hashed)


def ensure() -> None:
    """Installs the stack on Colab and Kaggle, else checks it; raises RuntimeError."""
    if "google.colab" not in sys.modules and "KAGGLE_KERNEL_RUN_TYPE" not in os.environ:
        if absent := [name for name in CORE if importlib.util.find_spec(name) is None]:
            remedy = "run `make setup`, then choose the kernel of its .venv"
            raise RuntimeError(f"{', '.join(absent)} not installed; {remedy}")
        return
    before = {name: installed_version(name) for name in REPLACED if name in sys.modules}
    install()
    if stale := [n for n, old in before.items() if installed_version(n) != old]:
        text = "was replaced after this kernel had loaded it: restart it, then run all"
        raise RuntimeError(f"{', '.join(stale)} {text}")


if __name__ == "__main__":
    install(*sys.argv[1:])
