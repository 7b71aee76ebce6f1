"""The place of a model: the offline one, a folder, the hub; and errors without one."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from helpers import runtime
from helpers.errors import ModelError

OFFLINE = "smollm2-135m-offline"
# gated models, and copies of the same weights that need no login
MIRRORS = {
    "meta-llama/Llama-3.2-1B": "unsloth/Llama-3.2-1B",
    "meta-llama/Llama-3.2-1B-Instruct": "unsloth/Llama-3.2-1B-Instruct",
    "meta-llama/Llama-3.2-3B": "unsloth/Llama-3.2-3B",
    "meta-llama/Llama-3.2-3B-Instruct": "unsloth/Llama-3.2-3B-Instruct",
    "meta-llama/Llama-2-7b-hf": "NousResearch/Llama-2-7b-hf",
    "meta-llama/Llama-2-7b-chat-hf": "NousResearch/Llama-2-7b-chat-hf",
}


def cache_folder() -> Path:
    """Returns the folder of downloads: `TUNEBOOK_CACHE`, else `~/.cache/tunebook`."""
    default = Path.home() / ".cache" / "tunebook"
    return Path(os.environ.get("TUNEBOOK_CACHE", default))


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder that replaces `folder` once it has been filled."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as scratch:
        filled, old = Path(scratch) / "new", Path(scratch) / "old"
        filled.mkdir()
        yield filled
        if folder.exists():
            folder.rename(old)
        filled.rename(folder)


def find_model(name: str) -> str:
    """Returns the folder or hub id to load: the offline model's folder, or the name.

    Raises:
        ModelError: the offline model's package is not installed.
    """
    if name != OFFLINE:
        return name
    folder = cache_folder() / OFFLINE
    if not (folder / "model.safetensors").exists():
        # in a process of its own, where Unsloth has not patched transformers
        command = [sys.executable, "-m", "helpers.models.offline", str(folder)]
        done = subprocess.run(command, cwd=runtime.ROOT, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ModelError(f"the offline model could not be converted: {reason}")
    return str(folder)


def unknown_model(name: str, error: Exception) -> ModelError:
    """Returns the error for a model that could not be loaded, in one sentence."""
    from huggingface_hub.errors import GatedRepoError

    if Path(name).is_dir():
        return ModelError(f"{name} holds no complete model: {str(error)[:200]}")
    cause: BaseException | None = error
    while cause is not None:  # the libraries wrap the hub's answer
        if isinstance(cause, GatedRepoError):
            return gated_model(name)
        cause = cause.__cause__ or cause.__context__
    if runtime.hub_reachable():
        return ModelError(f"model {name!r} could not be loaded: {str(error)[:300]}")
    return ModelError(
        f"model {name!r} is not a folder here, and the model hub cannot be reached; "
        f"check the name and the network, or use {OFFLINE!r}, which needs neither"
    )


def gated_model(name: str) -> ModelError:
    """Returns the error for a gated model, with its open mirror if there is one."""
    mirror = f", or use the open mirror {MIRRORS[name]!r}" if name in MIRRORS else ""
    return ModelError(
        f"model {name!r} is gated and your login has no access: accept its licence at "
        f"https://huggingface.co/{name} and log in with the same account, by `hf auth "
        "login` or the variable HF_TOKEN (on Colab a secret of that name: the key on "
        f"the left){mirror}"
    )
