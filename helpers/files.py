"""Files written whole or not at all, what is damaged set aside, and hashes."""

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from safetensors import SafetensorError, safe_open

from helpers.errors import TunebookError

log = logging.getLogger(__name__)
CONTENT = {".safetensors", ".bin", ".json", ".jinja", ".model", ".txt"}
MANIFEST = "manifest.json"  # sizes and hashes of a copy's files, written last
FULL = "No space left|quota exceeded|File too large|file write failed"  # torch's


@contextmanager
def disk_space(folder: Path, need_gb: float | None = None) -> Iterator[None]:
    """Raises TunebookError for a full disk, with what is free and what is needed."""
    try:
        yield
    except Exception as error:  # tokenizers and safetensors have classes of their own
        if not re.search(FULL, str(error)):
            raise
        for path in folder.glob("**/checkpoint-*"):
            if not (path / "trainer_state.json").exists():  # it was written to half
                shutil.rmtree(path)
        need = f", {need_gb:.2g} GB needed" if need_gb else ""
        text = f"{shutil.disk_usage(folder).free / 1e9:.2g} GB free{need}; make room"
        raise TunebookError(f"no space left for {folder}: {text}") from error


def set_aside(path: Path, mark: str) -> Path:
    """Renames a file or folder to `<name>.<mark>-<number>`; returns the new path."""
    former = [p.name[p.name.rindex("-") + 1 :] for p in path.parent.glob(f"*.{mark}-*")]
    number = 1 + max(map(int, filter(str.isdigit, former)), default=0)
    return path.rename(path.with_name(f"{path.name}.{mark}-{number}"))


def is_whole(path: Path) -> bool:
    """Returns whether JSON, safetensors or what torch saved can be read to its end."""
    with suppress(OSError, ValueError, SafetensorError, BadZipFile):
        if path.suffix == ".json":
            return json.loads(path.read_text("utf-8")) is not None
        if path.suffix == ".safetensors":
            return safe_open(path, "np") is not None
        return ZipFile(path).testzip() is None
    return False


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes a file whole or not at all; of several processes the first one does."""
    if os.environ.get("RANK", "0") != "0":
        return
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
    """Returns a file's content, empty without one; TunebookError if it is damaged."""
    with suppress(json.JSONDecodeError, UnicodeDecodeError):
        values = json.loads(path.read_text("utf-8")) if path.exists() else {}
        if isinstance(values, dict):
            return values
    text = f"{path} is damaged and now named {set_aside(path, 'damaged').name}: mend it"
    raise TunebookError(f"{text} and name it {path.name} again, or go on without it")


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
    return fingerprint([(file.name, hash_file(file)) for file in files])


def hash_file(path: Path) -> str:
    return hash_version(path, path.stat().st_size, path.stat().st_mtime_ns)


@cache
def hash_version(path: Path, size: int, modified_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> tuple[int, str]:
    """Writes rows as JSON lines, whole or not at all; returns number, fingerprint."""
    write_lines(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    with path.open("rb") as file:
        return sum(1 for _ in file), hash_file(path)[:12]


def stream_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a file; lines that are damaged stay in a copy set aside."""
    text, rows = path.read_text("utf-8", errors="replace"), list[dict[str, Any]]()
    lines = [line for line in text.split("\n") if line]
    for line in lines:
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    if len(rows) < len(lines):
        aside = set_aside(path, "damaged")
        write_rows(path, rows)
        log.warning(f"{path} was damaged: {len(rows)} rows stay, all are in {aside}")
    return rows


def find_copies(place: str, name: str) -> tuple[Any, str, list[str]]:
    """Returns a place's file system, the path for a name, and its copies in order."""
    import fsspec

    url, options = place, dict[str, Any]()
    if place.startswith("hub:"):
        url, options = f"hf://{place[4:]}", {"token": os.environ.get("HF_TOKEN", False)}
    system, root = fsspec.url_to_fs(url, **options)
    if "file" in system.protocol and not system.isdir(root):
        raise FileNotFoundError(f"{place} is no folder: mount it, or make it")
    system.invalidate_cache()
    manifests = list[str]()
    with suppress(FileNotFoundError):  # of a repository that is still to be made
        manifests = system.glob(f"{root}/{name}/*/{MANIFEST}")
    return system, f"{root}/{name}", sorted(map(os.path.dirname, manifests))


def list_sums(folder: Path) -> dict[str, list[Any]]:
    paths = [p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST]
    return {str(p.relative_to(folder)): [p.stat().st_size, hash_file(p)] for p in paths}


def send_copy(folder: Path, place: str, name: str) -> None:
    """Sends a folder to a folder, fsspec URL or `hub:owner/name`; two copies stay."""
    from huggingface_hub import HfApi

    system, path, copies = find_copies(place, name)
    copy = f"copy-{1 + max((int(c[-6:]) for c in copies), default=0):06}"
    api, repo = HfApi(token=os.environ.get("HF_TOKEN", False)), place[4:]
    if is_hub := place.startswith("hub:"):
        api.create_repo(repo, private=True, exist_ok=True)
        if not api.repo_info(repo).private:  # it existed
            raise ValueError("it is public: name a private one")
    for former in {*system.glob(f"{path}/copy-*")} - {*copies[-1:]}:  # halves too
        system.rm(former, recursive=True)
    write_json(folder / MANIFEST, list_sums(folder))
    if is_hub:  # in one commit, all or nothing
        target = f"{name}/{copy}"
        api.upload_folder(repo_id=repo, folder_path=folder, path_in_repo=target)
        return
    for file in [*list_sums(folder), MANIFEST]:
        system.makedirs(os.path.dirname(f"{path}/{copy}/{file}"), exist_ok=True)
        system.put_file(str(folder / file), f"{path}/{copy}/{file}")


def fetch_copy(place: str, name: str, folder: Path) -> bool:
    """Fills a folder from a place's newest whole copy; returns whether there is one."""
    from httpx import HTTPError

    try:
        system, _, copies = find_copies(place, name)
        for copy in reversed(copies):
            with tempfile.TemporaryDirectory() as new:
                system.get(f"{copy}/", f"{new}/", recursive=True)
                manifest = Path(new, MANIFEST)
                if is_whole(manifest) and list_sums(Path(new)) == read_json(manifest):
                    shutil.copytree(new, folder, dirs_exist_ok=True)
                    return True
            log.warning(f"{copy} is passed over: it is not as it was sent")
    except (OSError, HTTPError) as error:
        hint = "mend it, or unset TUNEBOOK_KEEP to go on without it"
        raise TunebookError(f"{place}/{name}: {error}; {hint}") from error
    return False
