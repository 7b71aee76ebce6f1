"""The errors that a user can mend, and hints at mistyped names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TunebookError(ValueError):
    """Base of our errors: the message says what was found and what to change."""

    def _render_traceback_(self) -> list[str]:
        # IPython's hook: a notebook shows the sentence, not the frames above it
        return [f"{type(self).__name__}: {self}"]


class ConfigError(TunebookError):
    """A configuration that cannot be run."""


class MissingInput(TunebookError, FileNotFoundError):
    """A file that an earlier notebook should have written is missing."""


class ModelError(TunebookError):
    """A model or adapter that cannot be loaded."""


class UnknownArchitecture(TunebookError):
    """A model whose config is neither known here nor on disk or hub."""


class DataError(TunebookError):
    """Rows that cannot be used; the message gives row numbers and reasons."""


class TemplateError(TunebookError):
    """A chat template that cannot be used for training or generation."""


class JudgeError(TunebookError):
    """A judge that cannot be asked."""


def nearest(name: str, known: Iterable[str], *, sure: float | None = None) -> str:
    """Returns a hint at the known name closest to a mistyped one, or nothing.

    `sure` is difflib's ratio from which on names are alike; longer ones then never.
    """
    names = list(known)
    longer = [k for k in names if name and k.startswith(name) and not sure]
    close = longer or difflib.get_close_matches(name, names, 1, sure or 0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
