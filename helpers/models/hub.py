"""Finds a model: the offline one, a folder, the hub's; says why one cannot be had."""

from __future__ import annotations

import os
import subprocess
import sys
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
    """Returns where converted models lie: `TUNEBOOK_CACHE` or `~/.cache/tunebook`."""
    default = Path.home() / ".cache" / "tunebook"
    return Path(os.environ.get("TUNEBOOK_CACHE", default))


def find_model(name: str) -> str:
    """Returns the folder or hub id to load: the offline model's folder, or the name.

    Raises:
        ModelError: the offline model's package is not installed.
    """
    if name != OFFLINE:
        return name
    folder = cache_folder() / OFFLINE
    if not (folder / "model.safetensors").exists():
        # in a process of its own: Unsloth has to be imported before transformers
        command = [sys.executable, "-m", "helpers.models.offline", str(folder)]
        done = subprocess.run(command, cwd=runtime.ROOT, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ModelError(f"the offline model could not be converted: {reason}")
    return str(folder)


def refusal(error: BaseException | None) -> int | None:
    """Returns the status by which the hub refused a gated model, None if it did not.

    401: no valid login was sent; 403: the account has not accepted the licence. The
    libraries wrap the hub's answer in errors of their own, so causes are followed.
    """
    from huggingface_hub.errors import GatedRepoError

    while error is not None:
        if isinstance(error, GatedRepoError):
            return error.response.status_code
        error = error.__cause__ or error.__context__
    return None


def unknown_model(name: str, error: Exception) -> ModelError:
    """Returns the error for a model that could not be loaded, in one sentence."""
    if Path(name).is_dir():
        return ModelError(
            f"{name} is a folder but holds no complete model: {str(error)[:200]}"
        )
    status = refusal(error)
    if status is not None:
        return gated_model(name, logged_in=status == 403)
    if runtime.hub_reachable():
        return ModelError(f"model {name!r} could not be loaded: {str(error)[:300]}")
    return ModelError(
        f"model {name!r} is not a folder here, and the model hub cannot be reached; "
        f"check the name and the network, or use {OFFLINE!r}, which needs neither"
    )


def gated_model(name: str, logged_in: bool) -> ModelError:
    """Returns the error for a gated model: how to get in, and what needs no login."""
    page = f"https://huggingface.co/{name}"
    if logged_in:
        found = "your account has not been let in"
        remedy = f"accept its licence at {page} (with the account of your token)"
    else:
        found = "you are not logged in"
        remedy = (
            f"accept its licence at {page}, then log in with `hf auth login` or the "
            "variable HF_TOKEN (on Colab a secret of that name: the key on the left)"
        )
    mirror = f", or use the open mirror {MIRRORS[name]!r}" if name in MIRRORS else ""
    return ModelError(f"model {name!r} is gated and {found}: {remedy}{mirror}")
