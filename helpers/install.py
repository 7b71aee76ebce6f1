"""Installs the stack into the running Python without touching a torch that is there.

`make setup` and the notebooks' first cell call it. Standard library only, because it
runs before anything else is installed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STACK = ROOT / "requirements.txt"
UNSLOTH = ROOT / "requirements-unsloth.txt"
CORE = ("torch", "transformers", "trl", "peft", "datasets")
REPLACED = ("datasets", "pyarrow", "fsspec", "torchao")  # what changes on Colab
# replacing one of these under a running Colab kernel breaks it, so pip may not
KEPT = ("torch", "torchvision", "numpy", "ipywidgets", "ipython", "ipykernel")


def read_pins(path: Path) -> dict[str, str]:
    """Returns `{package: specifier}` of a requirements file, comments left out."""
    text = re.sub(r"#.*", "", path.read_text(encoding="utf-8"))
    return dict(re.findall(r"^\s*([\w.-]+) *(.*?)\s*$", text, flags=re.M))


def installed_version(package: str) -> str | None:
    """Returns the installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def pip(*arguments: str) -> None:
    """Runs `pip install` quietly; SystemExit shows its last lines where it fails."""
    command = [sys.executable, "-m", "pip", "install", "-qq", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise SystemExit(
            f"pip install {' '.join(arguments)} failed:\n{tail}\nCheck the network and "
            "the disk space, then run it again: what is installed is kept."
        )


def install_cpu_torch(requirement: str) -> None:
    """Installs torch without CUDA's gigabytes; only uv knows where PyTorch keeps it."""
    pip("uv")
    command = [sys.executable, "-m", "uv", "pip", "install", "-q", requirement]
    command += ["--python", sys.executable, "--torch-backend", "cpu"]
    # where uv reaches nothing, pip takes what it is set up to find
    if subprocess.run(command, capture_output=True).returncode:
        pip(requirement)


def install(*extra: str) -> None:
    """Installs what is missing of the stack and of more requirement files."""
    if not STACK.exists():
        raise SystemExit(
            f"no {STACK}: pip installs the helpers without the project's requirements. "
            "Run `python helpers/install.py` in a clone of the repository"
        )
    files = [STACK, *(ROOT / name for name in extra)]
    versions = {name: installed_version(name) for name in KEPT}
    if not (versions["torch"] or shutil.which("nvidia-smi")):
        if sys.platform == "linux":
            install_cpu_torch("torch" + read_pins(STACK)["torch"])
            versions["torch"] = installed_version("torch")
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder, "kept.txt")
        kept.write_text("".join(f"{k}=={v}\n" for k, v in versions.items() if v))
        pip(*(f"-r{path}" for path in files), "-c", str(kept))
    pip("--no-deps", f"-r{UNSLOTH}")


def ensure() -> None:
    """Makes the stack usable in a notebook: installs on Colab and Kaggle, checks here.

    Raises:
        RuntimeError: the stack is not installed, or a package that the running kernel
            had already loaded was replaced; the message says what to do.
    """
    if "google.colab" not in sys.modules and "KAGGLE_KERNEL_RUN_TYPE" not in os.environ:
        absent = [name for name in CORE if importlib.util.find_spec(name) is None]
        if absent:
            raise RuntimeError(
                f"{', '.join(absent)} not installed in {sys.executable}: run `make "
                "setup` in the project folder, then choose the kernel of its .venv"
            )
        return
    before = {name: installed_version(name) for name in REPLACED if name in sys.modules}
    install()
    stale = [n for n, old in before.items() if old and installed_version(n) != old]
    if stale:
        raise RuntimeError(
            f"{', '.join(stale)} was replaced after this kernel had loaded it: choose "
            "Runtime > Restart session, then Run all again (nothing is installed twice)"
        )


def main(*extra: str) -> None:
    """Installs what is missing, with the files named, on a Python that was tested."""
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        version = ".".join(map(str, sys.version_info[:3]))
        raise SystemExit(
            f"Python {version} found; the pinned stack was tested on 3.11 to 3.13. "
            "Name another: make setup PYTHON=python3.12"
        )
    install(*extra)


if __name__ == "__main__":
    main(*sys.argv[1:])
