"""The experiment trackers of `report_to` that can be used here, without a question."""

from __future__ import annotations

import importlib.util
import netrc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

KNOWN = ["tensorboard", "wandb", "trackio"]


def choose_trackers(asked: str | list[str]) -> list[str]:
    """Returns the trackers that work here, with a printed word on the others.

    A recipe may name one that this machine lacks; that is no reason not to train, and
    nothing may ask for a login in the middle of a run.

    Args:
        asked: `report_to` of the training arguments.
    """
    names = KNOWN if asked == "all" else [asked] if isinstance(asked, str) else asked
    working = []
    for name in names:
        reason = reason_against(name)
        if reason:
            print(f"report_to: {name} is left out, {reason}")  # noqa: T201
        elif name != "none":
            working.append(name)
    return working


def reason_against(name: str) -> str:
    """Returns why a tracker cannot be used here, in words; empty when it can."""
    if name not in KNOWN:
        return ""
    if importlib.util.find_spec(name) is None:
        return f"it is not installed; run `pip install {name}`"
    if name == "wandb" and not wandb_is_ready():
        return "nobody is logged in; set WANDB_API_KEY or WANDB_MODE=offline"
    return ""


def wandb_is_ready() -> bool:
    """Returns whether W&B would start without asking for a login."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    if os.environ.get("WANDB_MODE") in ("disabled", "offline", "dryrun"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        file = netrc.netrc(os.environ.get("NETRC") or Path.home() / ".netrc")
    except (OSError, netrc.NetrcParseError):
        return False
    return bool(host and file.authenticators(host))


@contextmanager
def one_run() -> Iterator[None]:
    """Ends the W&B run that a training in this block begins.

    Left open it would take in the next stage's curves under this one's name. A run that
    is open before the block is the user's, and stays open.
    """
    before = open_wandb()
    try:
        yield
    finally:
        after = open_wandb()
        if before is None and after is not None:
            after.finish()


def open_wandb() -> Any:
    """Returns the W&B run of this process, None without one."""
    wandb = sys.modules.get("wandb")
    return wandb and wandb.run
