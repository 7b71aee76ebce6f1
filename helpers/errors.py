"""The errors that a user can mend, and hints at mistyped names."""

from collections.abc import Iterable
from difflib import get_close_matches


class TunebookError(ValueError):
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
