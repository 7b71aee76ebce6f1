"""tunebook's helpers: one package a subject; import the one you need."""

from importlib import import_module
from typing import Any

# the short names of two modules that other notebooks want: no torch until they need it
SHORT = {"rewards": "helpers.grpo.rewards", "callbacks": "helpers.training.callbacks"}


def __getattr__(name: str) -> Any:
    if name in SHORT:
        return import_module(SHORT[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
