"""The helpers installed by pip, without the project's folder around them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILT_FROM = ["pyproject.toml", "README.md", "LICENSE", "requirements.txt"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed package alone."""
    source = tmp_path_factory.mktemp("source")
    target = tmp_path_factory.mktemp("target")
    skipped = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "helpers", source / "helpers", ignore=skipped)
    for name in BUILT_FROM:
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--no-compile", "--target", str(target)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def python(
    installed: Path, folder: Path, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Runs a Python in a folder, with the installed package on its path."""
    steering = ("TUNEBOOK_RUNS", "TUNEBOOK_RUN", "PYTHONSAFEPATH")
    environment = {k: v for k, v in os.environ.items() if k not in steering}
    environment |= {"PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_the_readmes_example_runs_from_an_empty_folder(
    installed: Path, tmp_path: Path
) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split("## Using the helpers elsewhere\n")[1]
    snippet = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert snippet is not None
    done = python(installed, tmp_path, "-c", snippet[1])
    assert "[1.0, 0.0]" in done.stdout, done.stderr[-3000:]
    assert list(tmp_path.iterdir()) == []


def test_every_file_of_the_helpers_is_installed_and_nothing_else(
    installed: Path,
) -> None:
    def files(folder: Path) -> set[str]:
        paths = (p for p in folder.rglob("*") if p.is_file())
        return {str(p.relative_to(folder)) for p in paths if p.suffix != ".pyc"}

    assert files(installed / "helpers") == files(ROOT / "helpers")
    names = {path.name.partition("-")[0] for path in installed.iterdir()}
    assert names == {"helpers", "tunebook"}


def test_installing_replaces_no_package_unless_the_stack_is_named(
    installed: Path,
) -> None:
    (folder,) = installed.glob("*.dist-info")
    lines = PathDistribution(folder).requires or []
    always = [line for line in lines if not line.endswith('; extra == "stack"')]
    # of any version, so what is there stays
    assert always == ["lazy-loader", "numpy", "pydantic"]
    assert any(line.startswith("trl==") for line in lines)


def test_masking_and_rewards_need_only_what_pip_installs_with_them(
    installed: Path, tmp_path: Path
) -> None:
    code = """
        import sys, annotated_types, lazy_loader, numpy, pydantic
        before = {name.partition(".")[0] for name in sys.modules}
        from helpers import masking, rewards
        after = {name.partition(".")[0] for name in sys.modules}
        names = after - before - sys.stdlib_module_names
        print(sorted(name for name in names if name[0] != "_"))
    """
    done = python(installed, tmp_path, "-c", textwrap.dedent(code))
    assert done.stdout == "['helpers']\n", done.stderr


def test_runs_and_sample_data_of_installed_helpers_lie_in_the_working_folder(
    installed: Path, tmp_path: Path
) -> None:
    code = "from helpers import recipes, runs; runs.save_run(recipes.load('demo'))"
    assert python(installed, tmp_path, "-c", code).returncode == 0
    assert (tmp_path / "runs" / "demo" / "config.json").exists()
    code = "from helpers import data; print(data.load_rows('data_samples/a.csv'))"
    error = python(installed, tmp_path, "-c", code).stderr
    assert f"no file data_samples/a.csv (looked in {tmp_path}" in error
    (tmp_path / "data_samples").mkdir()
    (tmp_path / "data_samples" / "a.csv").write_text("text\nhello\n")
    assert "{'text': 'hello'}" in python(installed, tmp_path, "-c", code).stdout


def test_installing_the_stack_says_that_it_needs_a_clone(
    installed: Path, tmp_path: Path
) -> None:
    done = python(installed, tmp_path, "-m", "helpers.install")
    assert done.returncode == 1
    assert "clone of the repository" in done.stderr
    assert "Traceback" not in done.stderr
