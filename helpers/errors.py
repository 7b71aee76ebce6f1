"""The errors that a user can mend, and hints at mistyped names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A configuration that cannot be run; the message says what to change."""


class MissingInput(FileNotFoundError):
    """Something that a former notebook should have written is not there."""


class ModelError(ValueError):
    """A model or adapter that cannot be loaded; the message says what to do."""


class JudgeError(ValueError):
    """A judge that cannot be asked; the message says what to do."""


class UnknownArchitecture(ValueError):
    """A model whose numbers are neither known here nor found on disk or hub."""


class DataError(ValueError):
    """Rows that cannot be used; the message gives row numbers and reasons."""


class TemplateError(ValueError):
    """A chat template that cannot be trained or generated with as it is."""


def nearest(name: str, known: Iterable[str], *, sure: float | None = None) -> str:
    """Returns a hint at the known name closest to a mistyped one.

    With `sure`, a ratio of difflib's, nothing less alike is named, and no longer name.

    >>> nearest("learning_rat", ["learning_rate", "seed"])
    "; did you mean 'learning_rate'?"
    >>> nearest("guanaco", ["demo", "guanaco-llama2-7b"])
    "; did you mean 'guanaco-llama2-7b'?"
    >>> nearest("zzz", ["seed"])
    ''
    """
    names = list(known)
    longer = [k for k in names if name and k.startswith(name) and not sure]
    close = longer or difflib.get_close_matches(name, names, 1, sure or 0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
