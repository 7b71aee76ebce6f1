"""The pages on models, curves and additions: blocks are run, tables are held."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import models, publish
from helpers.training.inputs import PANELS

ROOT = Path(__file__).resolve().parent.parent
ADDING = (ROOT / "docs" / "adding.md").read_text("utf-8")
CURVES = (ROOT / "docs" / "curves.md").read_text("utf-8")
MODELS = (ROOT / "docs" / "models.md").read_text("utf-8")
README = (ROOT / "README.md").read_text("utf-8")
RELIABILITY = (ROOT / "docs" / "reliability.md").read_text("utf-8")
BLOCK = re.compile(r"```(toml|diff|python)\n(.*?)```", re.DOTALL)


def test_what_the_page_says_to_add_is_added_and_works(tmp_path, monkeypatch):
    for name in ("helpers", "data_samples"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.setenv("TUNEBOOK_RUNS", str(tmp_path / "runs"))
    blocks = BLOCK.findall(ADDING)
    assert [kind for kind, _ in blocks if kind != "python"] == ["toml", "diff", "diff"]
    for kind, text in blocks:
        if kind == "toml":
            with (tmp_path / "helpers" / "recipes.toml").open("a") as file:
                file.write(f"\n{text}")
            continue
        command = ["patch", "-p1"] if kind == "diff" else [sys.executable, "-"]
        options = {"cwd": tmp_path, "capture_output": True, "text": True}
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(command, input=text, env=environment, **options)
        assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
        assert "fuzz" not in done.stdout, done.stdout
    assert (tmp_path / "runs" / "mine" / "config.json").exists()


TABLES = {
    "fits": (MODELS, models.fits),
    "labels": (MODELS, models.labels),
    "speed of results/sft_speed.json": (README, publish.speed_table),
    "faults of results/faults.json": (RELIABILITY, publish.faults_table),
}


@pytest.mark.parametrize("mark", TABLES)
def test_the_tables_of_pages_are_what_is_computed_today(mark):
    page, table = TABLES[mark]
    rest = page.split(f"<!-- {mark} -->")[1]
    assert rest.split(f"<!-- end of {mark.split()[0]} -->")[0].strip() == table()


def test_the_page_of_results_is_made_from_the_files_beside_it():
    assert (publish.RESULTS / "README.md").read_text("utf-8") == publish.page()


def test_a_symptom_of_the_curves_names_the_check_that_detects_it():
    rows = re.findall(r"^\| .* \| `(.*)`: \"(.*)\" \|$", CURVES, re.M)
    assert len(rows) > 10 and len(rows) == CURVES.count('`: "')
    for place, words in rows:
        assert words in (ROOT / place).read_text("utf-8"), words


def test_the_examples_of_curves_and_models_give_what_their_pages_say(capsys):
    names = {}
    for text in (CURVES, MODELS):
        (example,) = [block for kind, block in BLOCK.findall(text) if kind == "python"]
        exec(example, names)
    assert f"    {names['sentences'][0]}" in CURVES
    assert "activations" in capsys.readouterr().out


def test_every_panel_is_explained():
    titles = {title.partition(" (")[0].partition(", ")[0] for title in PANELS}
    assert [title for title in sorted(titles) if f"**{title}**" not in CURVES] == []
