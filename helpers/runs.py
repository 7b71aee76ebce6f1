"""The run folder `runs/<name>/`: the only thing that notebooks hand to each other.

Nothing here trains or measures anything.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

from helpers import recipes, report
from helpers.config import RunConfig, read_config
from helpers.errors import MissingInput
from helpers.runtime import current_run, runs_folder

CONTENT = {".safetensors", ".bin", ".json", ".jinja", ".model", ".txt"}
MADE_BY = {
    "config.json": "00_setup",
    "data": "01_data_prep",
    "sft": "02_sft_qlora",
    "grpo": "03_grpo_gsm8k",
    "eval": "04_evaluation",
    "export": "05_export",
}


@dataclass(frozen=True)
class Run:
    """A run folder and its config."""

    path: Path
    config: RunConfig

    def require(self, relative: str) -> Path:
        """Returns the path of something in the folder; MissingInput names its maker."""
        path = self.path / relative
        if path.exists():
            return path
        maker = MADE_BY.get(relative.split("/")[0], "00_setup")
        raise MissingInput(f"{path} is missing: run notebook {maker} with this run")

    def write_part(self, part: str, values: dict[str, Any]) -> None:
        """Writes one stage's part of `report.json`, leaving the other parts alone."""
        path = self.path / "report.json"
        write_json(path, report.check(self.report() | {part: values}, path))

    def report(self) -> dict[str, Any]:
        """Returns `report.json` as it stands, empty before the first stage."""
        path = self.path / "report.json"
        return report.check(read_json(path), path)


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """Yields a file that replaces `path` once written: nobody meets half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("wb") as file:
            yield file
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    with new_file(path) as file:
        file.write(text.encode())


def write_json(path: Path, values: Any) -> None:
    """Writes JSON, indented, whole or not at all."""
    write_text(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Returns the content of a JSON file, empty when there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def fingerprint(*values: Any) -> str:
    """Returns twelve hex digits that change whenever one of the values does."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def content_hash(path: Path | str | None) -> str:
    """Returns the hash of a local model's or adapter's files; a hub id stands as is."""
    folder = Path(str(path))
    if path is None or not folder.is_dir():
        return str(path)
    files = sorted(f for f in folder.iterdir() if f.suffix in CONTENT and f.is_file())
    stats = [(f, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hash_files(tuple(stats))


@cache
def hash_files(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Returns the hash of files' names and contents; a new size or time asks anew."""
    digest = hashlib.sha256()
    for path, size, _ in files:
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def save_run(config: RunConfig) -> Run:
    """Returns the run of a config: written to its folder, and now the current one."""
    run = Run(runs_folder() / config.name, config)
    write_text(run.path / "config.json", config.model_dump_json(indent=1) + "\n")
    write_text(runs_folder() / "current", config.name + "\n")
    run.write_part("run", config.model_dump(include={"name", "recipe", "model"}))
    return run


def open_run(name: str | None = None) -> Run:
    """Returns a run, by default the current one; a recipe's name makes its run.

    Raises:
        ConfigError: the run's config is missing or not valid.
    """
    name = name or current_run() or recipes.default_name()
    folder = runs_folder() / name
    if name in recipes.NAMES and not folder.exists():
        return save_run(recipes.load(name))
    return Run(folder, read_config(folder / "config.json"))
