"""Tables of the pages."""

from __future__ import annotations

from typing import Any

import pandas as pd


def to_markdown(rows: list[dict[str, Any]] | pd.DataFrame) -> str:
    """Returns rows as a Markdown table, numbers as they are written, `-` for None."""
    frame = pd.DataFrame(rows, dtype=object).fillna("-")
    return frame.to_markdown(index=False, disable_numparse=True, stralign=None)
