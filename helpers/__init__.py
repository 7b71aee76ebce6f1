"""tunebook's helpers: one package a subject; import the one you need."""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    if name == "rewards":  # its short name: no torch until something needs it
        return import_module("helpers.grpo.rewards")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
