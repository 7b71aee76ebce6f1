"""Tests of helpers.install and of the requirement files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from helpers import install

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(ROOT.glob("requirements*.txt"))
ABSENT = "tunebook-test-no-such-package"

# What Colab has and what may move there: Colab's datasets is excluded by Unsloth, and
# the new one asks for a newer pyarrow.
MAY_MOVE = {"datasets", "pyarrow", "fsspec"}
STAYS = ["torch", "numpy", "ipywidgets", "ipython", "ipykernel"]
# Torch's own CUDA libraries: Colab's torch is built for another CUDA than PyPI's, which
# is the one that a resolver sees.
CUDA = re.compile(r"(nvidia|cuda)-.*|triton|torchvision|torchaudio")


def test_pins_are_read_without_comments_and_blank_lines(tmp_path):
    path = tmp_path / "requirements.txt"
    path.write_text(
        "# The stack.\n\ntorch>=2.11,<=2.13.0\n  a_b.x-y ==1.2   # why\nbare\n"
    )
    pins = {"torch": ">=2.11,<=2.13.0", "a_b.x-y": "==1.2", "bare": ""}
    assert install.read_pins(path) == pins


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_package_of_the_files_has_a_valid_upper_bound(path):
    for name, specifier in install.read_pins(path).items():
        operators = {s.operator for s in SpecifierSet(specifier)}
        assert operators & {"==", "<", "<="}, name


def test_every_package_is_pinned_in_one_place_only():
    names = [canonicalize_name(n) for path in FILES for n in install.read_pins(path)]
    assert sorted(names) == sorted(set(names))


def test_unsloths_packages_touch_nothing_that_a_running_colab_kernel_uses():
    names = {canonicalize_name(name) for name in install.read_pins(install.UNSLOTH)}
    assert names.isdisjoint({*STAYS, *install.CORE, "torchvision"})


@pytest.mark.parametrize("version", [(3, 10, 14), (3, 14, 0), (2, 7, 18)])
def test_a_python_that_was_not_tested_is_refused_with_a_remedy(version, monkeypatch):
    monkeypatch.setattr(install, "sys", SimpleNamespace(version_info=version))
    found = re.escape(".".join(map(str, version)))
    with pytest.raises(SystemExit, match=rf"Python {found} found.*PYTHON=python3\.12"):
        install.main()
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'requires-python = ">=3.11,<3.14"' in text


def test_a_notebook_without_the_stack_says_what_to_run(monkeypatch):
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    install.ensure()
    monkeypatch.setattr(install, "CORE", ("json", "no_such_module_of_ours"))
    message = r"^no_such_module_of_ours not installed in .*`make setup`"
    with pytest.raises(RuntimeError, match=message):
        install.ensure()


def test_a_loaded_package_that_was_replaced_asks_for_a_restart(monkeypatch):
    # installing for real would change this very environment
    versions = iter(["1.0", "2.0"])
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    monkeypatch.setattr(install, "install", lambda: None)
    monkeypatch.setattr(install, "REPLACED", ("json",))
    monkeypatch.setattr(install, "installed_version", lambda name: next(versions))
    with pytest.raises(RuntimeError, match="json was replaced.*Restart session"):
        install.ensure()


def test_a_failed_installation_shows_the_words_of_pip_and_a_remedy():
    with pytest.raises(SystemExit, match=rf"(?s){ABSENT}.*Check the network"):
        install.pip("--no-index", ABSENT)


@pytest.fixture(scope="module")
def colab():
    """The packages of Colab's GPU runtime: `{name: version}`, without local parts."""
    named = os.environ.get("TUNEBOOK_COLAB_LIST")
    beside = ROOT.parent / "shared" / "colab" / "pip-freeze.gpu.txt"
    path = Path(named) if named else beside
    if not path.exists():
        pytest.skip("no list of Colab's packages: set TUNEBOOK_COLAB_LIST to one")
    lines = path.read_text(encoding="utf-8").splitlines()
    pins = [re.fullmatch(r"([\w.-]+)==([\w.!]+)(\+\S+)?", line) for line in lines]
    return {canonicalize_name(pin[1]): pin[2] for pin in pins if pin}


def test_what_colab_ships_is_in_the_range_of_the_stack(colab):
    outside = [
        f"{name}=={colab[name]}, not {specifier}"
        for name, specifier in install.read_pins(install.STACK).items()
        if name in colab and name not in MAY_MOVE
        if not SpecifierSet(specifier).contains(colab[name], prereleases=True)
    ]
    assert outside == []


@pytest.mark.network
def test_installing_the_stack_on_colab_moves_only_what_may_move(colab, tmp_path):
    fixed = {
        n: v for n, v in colab.items() if n not in MAY_MOVE and not CUDA.fullmatch(n)
    }
    kept = tmp_path / "colab.txt"
    kept.write_text("".join(f"{name}=={version}\n" for name, version in fixed.items()))
    command = [sys.executable, "-m", "uv", "pip", "compile", str(install.STACK)]
    command += ["--constraint", str(kept), "--no-header", "--no-annotate"]
    command += ["--python-version", "3.13", "--no-python-downloads"]
    command += ["--python-platform", "x86_64-manylinux_2_28", "--only-binary", ":all:"]
    # pure Python without a wheel; the latter is Colab's own version
    command += ["--no-binary", "rouge-score", "--no-binary", "antlr4-python3-runtime"]
    done = subprocess.run(command, capture_output=True, text=True)
    if re.search("error sending request|Failed to fetch|timed out", done.stderr):
        pytest.skip("the package index does not answer")
    assert done.returncode == 0, done.stderr
    pins = re.findall(r"^([\w.-]+)==(\S+)", done.stdout, flags=re.M)
    resolved = {canonicalize_name(name): version for name, version in pins}
    both = resolved.keys() & fixed.keys()
    assert [n for n in both if Version(resolved[n]) != Version(fixed[n])] == []
    assert {canonicalize_name(n) for n in install.read_pins(install.STACK)} <= {
        *resolved
    }
