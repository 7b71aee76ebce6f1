"""Installs the stack into the running Python without touching a torch that is there.

`make setup` and the notebooks' first cell call the same function. Standard library
only, because it runs before anything else is installed.

    python helpers/install.py
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
# Replacing one of these under a running Colab kernel breaks it, so pip may not.
CORE = ("torch", "transformers", "trl", "peft", "datasets")
REPLACED = ("datasets", "pyarrow", "fsspec", "torchao")  # what changes on Colab
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


def missing(path: Path) -> list[str]:
    """Returns the lines of a requirements file that this Python does not satisfy.

    Needs `packaging` for version ranges; without it every line counts as missing.
    """
    pins = read_pins(path)
    if importlib.util.find_spec("packaging") is None:
        return [name + specifier for name, specifier in pins.items()]
    from packaging.specifiers import SpecifierSet

    lines = []
    for name, specifier in pins.items():
        version, allowed = installed_version(name), SpecifierSet(specifier)
        if version is None or not allowed.contains(version, prereleases=True):
            lines.append(name + specifier)
    return lines


def has_gpu() -> bool:
    """Returns whether an NVIDIA driver is at work here (asked before torch exists)."""
    if shutil.which("nvidia-smi") is None:
        return False
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0


def pip(*arguments: str) -> None:
    """Runs `pip install` quietly.

    Raises:
        SystemExit: pip failed; its own last lines are shown.
    """
    command = [sys.executable, "-m", "pip", "install", "-qq", *arguments]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        tail = "\n".join((process.stdout + process.stderr).strip().splitlines()[-15:])
        raise SystemExit(
            f"pip install {' '.join(arguments)} failed with exit status "
            f"{process.returncode}:\n{tail}\nCheck the network and the disk space, "
            "then run the same command again: what is installed is kept."
        )


def install_cpu_torch(specifier: str) -> None:
    """Installs torch without CUDA's gigabytes on a Linux machine that has no GPU.

    uv knows where PyTorch keeps its CPU builds; where that cannot be reached, pip
    takes what it is set up to find (on a Mac PyPI's build is the CPU one).
    """
    requirement = "torch" + specifier
    if sys.platform == "linux":
        pip("uv")
        command = [sys.executable, "-m", "uv", "pip", "install", "-q"]
        command += ["--python", sys.executable, "--torch-backend", "cpu", requirement]
        environment = {**os.environ, "UV_HTTP_RETRIES": "0"}
        if not subprocess.run(command, capture_output=True, env=environment).returncode:
            return
    pip(requirement)


def install(*, extra: tuple[str, ...] = ()) -> list[str]:
    """Returns the requirement lines that were missing and are installed now.

    Args:
        extra: more requirement files, for example the tests' tools.

    Raises:
        SystemExit: pip could not install something.
    """
    if not STACK.exists():
        raise SystemExit(
            f"no {STACK}: pip installs the helpers without the project's requirements. "
            "Run `python helpers/install.py` in a clone of the repository"
        )
    files = [STACK, *(ROOT / name for name in extra)]
    lines = [line for path in files for line in missing(path)]
    unsloth = missing(UNSLOTH)
    if any(re.match(r"torch[<>=]", line) for line in lines) and not has_gpu():
        install_cpu_torch(read_pins(STACK)["torch"])
    if lines:
        versions = {name: installed_version(name) for name in KEPT}
        with tempfile.TemporaryDirectory() as folder:
            kept = Path(folder) / "kept.txt"
            text = "".join(f"{k}=={v}\n" for k, v in versions.items() if v)
            kept.write_text(text, encoding="utf-8")
            pip(*(f"-r{path}" for path in files), "-c", str(kept))
    if unsloth:
        pip("--no-deps", *unsloth)
    return lines + unsloth


def ensure() -> None:
    """Makes the stack usable in a notebook: installs on Colab and Kaggle, checks here.

    Raises:
        RuntimeError: the stack is not installed, or a package that the running kernel
            had already loaded was replaced; the message says what to do.
    """
    hosted = "google.colab" in sys.modules or "KAGGLE_KERNEL_RUN_TYPE" in os.environ
    if not hosted:
        absent = [name for name in CORE if importlib.util.find_spec(name) is None]
        if not absent:
            return
        raise RuntimeError(
            f"{', '.join(absent)} not installed in {sys.executable}: run `make setup` "
            "in the project folder, then choose the kernel of its .venv"
        )
    before = {name: installed_version(name) for name in REPLACED if name in sys.modules}
    install()
    stale = [n for n, old in before.items() if old and installed_version(n) != old]
    if stale:
        raise RuntimeError(
            f"{', '.join(stale)} was replaced after this kernel had loaded it: choose "
            "Runtime > Restart session, then Run all again (nothing is installed twice)"
        )


def main(extra: tuple[str, ...]) -> None:
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        version = ".".join(map(str, sys.version_info[:3]))
        raise SystemExit(
            f"Python {version} found; the pinned stack was tested on 3.11 to 3.13. "
            "Name another: make setup PYTHON=python3.12"
        )
    lines = install(extra=extra)
    kind = "CUDA" if has_gpu() else "CPU"
    state = f"{len(lines)} packages installed" if lines else "ready"
    print(f"{kind} machine: {state}")  # noqa: T201


if __name__ == "__main__":
    main(tuple(sys.argv[1:]))
