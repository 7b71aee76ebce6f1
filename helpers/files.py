"""Files written whole or not at all, JSON and JSON lines, and hashes of contents."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any

CONTENT = {".safetensors", ".bin", ".json", ".jinja", ".model", ".txt"}


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


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> tuple[int, str]:
    """Writes rows as JSON lines, whole or not at all; returns number, fingerprint."""
    digest, count = hashlib.sha256(), 0
    with new_file(path) as file:
        for row in rows:
            line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
            file.write(line)
            digest.update(line)
            count += 1
    return count, digest.hexdigest()[:12]


def stream_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a JSON-lines file of ours, one at a time."""
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a JSON-lines file of ours."""
    return list(stream_rows(path))
