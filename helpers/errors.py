"""The errors that a user can mend, and hints at mistyped names."""

import os
import re
from collections.abc import Iterable
from difflib import get_close_matches


def mask_secrets(text: str) -> str:
    """Returns a text without tokens: the environment's, and what begins like one."""
    for name, value in os.environ.items():
        if name.endswith(("_TOKEN", "_API_KEY")) and len(value) > 5:
            text = text.replace(value, "***")
    return re.sub(r"\b(?:hf_|sk-)[\w-]{6,}", "***", text)


class TunebookError(ValueError):
    def __str__(self) -> str:
        return mask_secrets(super().__str__())

    def _render_traceback_(self) -> list[str]:
        # IPython's hook: a notebook shows the sentence, not the frames above it
        return [f"{type(self).__name__}: {self}"]


class ConfigError(TunebookError): ...


class MissingInput(TunebookError, FileNotFoundError): ...


class ModelError(TunebookError): ...


class UnknownArchitecture(TunebookError): ...


class DataError(TunebookError): ...


class TrainingError(TunebookError): ...


class TemplateError(TunebookError): ...


class JudgeError(TunebookError): ...


def nearest(name: str, known: Iterable[str], *, sure: float = 0.6) -> str:
    """Returns a hint at the known name most like a mistyped one, or nothing."""
    close = get_close_matches(name, known, 1, sure)
    return f"; did you mean {close[0]!r}?" if close else ""
