"""Tests of helpers.install and of the requirement files."""

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from helpers import install

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(ROOT.glob("requirements*.txt"))
GGUF = ROOT / "requirements-gguf.txt"
ABSENT = "tunebook-test-no-such-package"

# What Colab has and what may move there: Colab's datasets is excluded by Unsloth, and
# the new one asks for a newer pyarrow.
MAY_MOVE = {"datasets", "pyarrow", "fsspec"}
STAYS = ["torch", "numpy", "ipywidgets", "ipython", "ipykernel"]


def read_pins(path):
    """`{package: specifier}` of a requirements file, comments left out."""
    text = re.sub("#.*", "", path.read_text(encoding="utf-8"))
    text = re.sub(r" \\\n +--hash=sha256:[0-9a-f]{64}", "", text)
    return dict(re.findall(r"^\s*([\w.-]+) *(.*?)\s*$", text, flags=re.M))


def test_every_package_is_pinned_once_with_a_valid_upper_bound():
    pins = [pin for path in FILES for pin in read_pins(path).items()]
    assert len({canonicalize_name(name) for name, _ in pins}) == len(pins) > 30
    for name, specifier in pins:
        assert {s.operator for s in SpecifierSet(specifier)} & {"==", "<", "<="}, name


def test_unsloths_packages_touch_nothing_that_a_running_colab_kernel_uses():
    names = {canonicalize_name(name) for name in read_pins(install.UNSLOTH)}
    assert names.isdisjoint({*STAYS, *install.CORE, "torchvision"})


@pytest.mark.parametrize("version", [(3, 10, 14), (3, 14, 0)])
def test_a_python_that_was_not_tested_is_refused_with_a_remedy(version, monkeypatch):
    monkeypatch.setattr(install, "sys", SimpleNamespace(version_info=version))
    number = re.escape(".".join(map(str, version)))
    with pytest.raises(SystemExit, match=f"Python {number} found.*PYTHON=python3"):
        install.install()
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'requires-python = ">=3.11,<3.14"' in text


def test_a_requirement_file_that_does_not_exist_is_one_sentence():
    with pytest.raises(SystemExit, match="no .*-gguff.txt: name a requirement"):
        install.install("requirements-gguff.txt")


def test_a_notebook_without_the_stack_says_what_to_run(monkeypatch):
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    install.ensure()
    monkeypatch.setattr(install, "CORE", ("json", "no_such_module_of_ours"))
    message = "^no_such_module_of_ours not installed; run `make setup`"
    with pytest.raises(RuntimeError, match=message):
        install.ensure()


def test_a_loaded_package_that_was_replaced_asks_for_a_restart(monkeypatch):
    # installing for real would change this very environment
    versions = iter(["1.0", "2.0"])
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    monkeypatch.setattr(install, "install", lambda: None)
    monkeypatch.setattr(install, "REPLACED", ("json",))
    monkeypatch.setattr(install, "installed_version", lambda name: next(versions))
    with pytest.raises(RuntimeError, match="json was replaced after .* restart it"):
        install.ensure()


def test_a_failed_installation_shows_the_words_of_pip_and_a_remedy():
    with pytest.raises(SystemExit, match=rf"(?s){ABSENT}.*Check the network"):
        install.pip("--no-index", ABSENT)


def test_the_cpus_torch_is_installed_where_there_is_none_and_colabs_is_kept(
    monkeypatch, capsys
):
    calls, versions = [], {"numpy": "2.1"}

    def pip(*arguments):
        calls.append((arguments, [a for a in arguments if "==" in a]))

    monkeypatch.setattr(install, "pip", pip)
    monkeypatch.setattr(install, "installed_version", versions.get)
    monkeypatch.setattr(install.shutil, "which", lambda name: None)
    commands = []
    monkeypatch.setattr(install.subprocess, "run", lambda c, **_: commands.append(c))
    install.install("requirements-dev.txt")
    (uv, _), (stack, kept), (unsloth, _) = calls
    assert "the first time takes minutes" in capsys.readouterr().out
    assert uv == ("uv",) and commands[0][-2:] == ["--torch-backend", "cpu"]
    assert "torch" in commands[0] and str(install.STACK) in commands[0]
    assert stack[:2] == (f"-r{install.STACK}", f"-r{ROOT / 'requirements-dev.txt'}")
    assert unsloth == ("--no-deps", f"-r{install.UNSLOTH}")
    assert kept == ["numpy==2.1"]
    calls.clear()
    install.install("requirements-gguf.txt", "requirements-chat.txt")
    (stack, _), _, (gguf, _) = calls[1:]
    assert stack[1:] == (f"-r{ROOT / 'requirements-chat.txt'}", "numpy==2.1")
    assert gguf == (f"-r{GGUF}", "--no-deps", "--require-hashes")
    calls.clear()
    versions["torch"] = "2.11.0+cu128"
    install.install()
    assert len(calls) == 2 and calls[0][1] == ["torch==2.11.0+cu128", "numpy==2.1"]


def test_an_extra_is_installed_when_a_package_is_missing_or_of_another_version(
    monkeypatch,
):
    calls, versions = [], {n: s[2:] for n, s in read_pins(GGUF).items()}
    versions["torch"] = "2.11.0+cu128"
    monkeypatch.setattr(install, "pip", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(install, "installed_version", versions.get)
    install.extra("requirements-gguf.txt")
    assert calls == []
    versions["libgguf"] = "0.2.1"
    install.extra("requirements-gguf.txt", "requirements-chat.txt")
    assert calls[0] == (f"-r{GGUF}", "--no-deps", "--require-hashes")
    assert calls[1] == (f"-r{ROOT / 'requirements-chat.txt'}", "torch==2.11.0+cu128")


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
        for name, specifier in read_pins(install.STACK).items()
        if name in colab and name not in MAY_MOVE
        if not SpecifierSet(specifier).contains(colab[name], prereleases=True)
    ]
    assert outside == []
