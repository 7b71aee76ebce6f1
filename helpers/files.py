"""Files written whole or not at all, JSON and JSON lines, and hashes of contents."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

CONTENT = {".safetensors", ".bin", ".json", ".jinja", ".model", ".txt"}


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes a file whole or not at all: nobody meets half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(lines)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder that replaces `folder` once it has been filled."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as scratch:
        filled = Path(scratch) / "new"
        filled.mkdir()
        yield filled
        if folder.exists():
            folder.rename(Path(scratch) / "old")
        filled.rename(folder)


def write_json(path: Path, values: Any) -> None:
    write_lines(path, [json.dumps(values, indent=1, ensure_ascii=False), "\n"])


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
    return fingerprint([(path.name, hash_file(path, *stat)) for path, *stat in stats])


@cache
def hash_file(path: Path, size: int, modified_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> tuple[int, str]:
    """Writes rows as JSON lines, whole or not at all; returns number, fingerprint."""
    write_lines(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        file.seek(0)
        return sum(1 for _ in file), digest.hexdigest()[:12]


def stream_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def read_rows(path: Path) -> list[dict[str, Any]]:
    return list(stream_rows(path))
