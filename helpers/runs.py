"""The run folder `runs/<name>/`: the only thing that notebooks hand to each other."""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

from pydantic import BaseModel, ValidationError

from helpers import files, recipes
from helpers.config import RunConfig, changed, read_config
from helpers.errors import DataError, MissingInput, TunebookError
from helpers.files import disk_space, read_json, write_json, write_lines
from helpers.runtime import current_run, runs_folder

log = logging.getLogger(__name__)
BEAT_S, SILENT_S = 20, 120  # a holder's sign of life, and when it counts as dead
P = ParamSpec("P")
T = TypeVar("T")


class Report(BaseModel, extra="forbid"):
    run: dict[str, str] = {}
    environment: dict[str, Any] = {}
    data: dict[str, Any] = {}
    sft: dict[str, Any] = {}
    grpo: dict[str, Any] = {}
    eval: dict[str, dict[str, Any]] = {}
    comparisons: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    blind: dict[str, dict[str, Any]] = {}
    export: dict[str, Any] = {}
    notebooks: dict[str, dict[str, float]] = {}


class Run(NamedTuple):
    """A run folder and its config."""

    path: Path
    config: RunConfig

    def require(self, relative: str) -> Path:
        """Returns a path in the folder; MissingInput, or DataError for other rows."""
        path, (notebook, *_) = self.path / relative, Path(relative).parts
        if not path.exists():
            text = f"run the {notebook} notebook first, or `train {self.path.name}`"
            raise MissingInput(f"{path} is missing: {text}")
        if not all(map(files.is_whole, path.glob("*.safetensors"))):
            raise MissingInput(f"{path} is damaged: train {path.parent.name} again")
        part = self.report().get("data", {}) if notebook == "data" else {}
        digest = part.get("fingerprints", {}).get(path.stem)
        if digest and digest != files.hash_file(path)[:12]:
            text = f"{path} has {path.read_bytes().count(10)} rows, not the "
            text += f"{part[path.stem]} written: move it away to prepare the data again"
            raise DataError(text)
        return path

    def report(self, **changes: Any) -> dict[str, Any]:
        """Returns `report.json` with parts changed, empty before the first stage."""
        path = self.path / "report.json"
        values = read_json(path) | changes
        try:
            Report.model_validate(values, strict=True)
        except ValidationError as error:
            raise TunebookError(f"{path} does not fit its schema: {error}") from None
        return values

    def write_part(self, part: str, values: dict[str, Any]) -> None:
        """Writes one part of `report.json`, leaving the others alone."""
        write_json(self.path / "report.json", self.report(**{part: values}))


def save_run(config: RunConfig, current: bool = False) -> Run:
    """Returns the run of a config, in its folder; the notebooks' next if `current`."""
    run = Run(runs_folder() / config.name, config)
    with hold(run):
        write_json(run.path / "config.json", config.model_dump(mode="json"))
        if current:
            write_lines(runs_folder() / "current", [config.name])
        run.write_part("run", config.model_dump(include={"name", "recipe", "model"}))
    return run


def open_run(name: str | None = None) -> Run:
    """Returns a run, by default the current one; a recipe's name makes its run.

    Without any it is `TUNEBOOK_RECIPE`'s or the usual. ConfigError for no valid config.
    """
    is_named = bool(name)
    name = name or current_run() or os.environ.get("TUNEBOOK_RECIPE") or recipes.usual()
    folder = runs_folder() / name
    if name in recipes.NAMES and not folder.exists():
        return save_run(recipes.load(name), current=not is_named)
    read_json(folder / "config.json")  # sets a damaged one aside; a copy is renamed
    return Run(folder, changed(read_config(folder / "config.json"), name=folder.name))


def is_run(name: str) -> bool:
    # a model's folder has a config.json too, a run's name is not a path
    return Path(name).name == name and (runs_folder() / name / "config.json").exists()


@contextmanager
def hold(run: Run) -> Iterator[None]:
    """Keeps others from writing to a run; TunebookError if a live process does."""
    path = run.path / "lock.json"
    me = {"host": socket.gethostname(), "pid": os.getpid()}
    holder = find_holder(path) if os.environ.get("RANK", "0") == "0" else me
    if holder == me:
        yield  # of a call within a call; of several processes the first one holds it
        return
    if holder:
        text = "process {pid} on {host}: wait for its end, or stop it".format(**holder)
        raise TunebookError(f"{run.path} is written to by {text}")
    run.path.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    try:
        with path.open("x", encoding="utf-8") as file:
            json.dump(me, file)
    except FileExistsError:
        raise TunebookError(f"{path} was just taken by another process") from None
    done = threading.Event()

    def beat() -> None:
        with suppress(OSError):  # the lock is gone
            while not done.wait(BEAT_S):
                os.utime(path)

    threading.Thread(target=beat, daemon=True).start()
    try:
        with disk_space(run.path):
            yield
    finally:
        done.set()
        path.unlink(missing_ok=True)


def find_holder(path: Path) -> dict[str, Any] | None:
    """Returns host and process of a lock whose process is alive."""
    import psutil

    try:
        holder, silent_s = read_json(path), time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return None
    here = holder["host"] == socket.gethostname()
    if silent_s < SILENT_S and (not here or psutil.pid_exists(holder["pid"])):
        return holder
    log.info("%s: process %d on %s is gone", path, holder["pid"], holder["host"])
    return None


def writes(function: Callable[P, T]) -> Callable[P, T]:
    """Has a function hold the last run among its arguments while it works."""

    @wraps(function)
    def held(*arguments: P.args, **options: P.kwargs) -> T:
        values = [*arguments, *options.values()]
        with hold([value for value in values if isinstance(value, Run)][-1]):
            return function(*arguments, **options)

    return held
