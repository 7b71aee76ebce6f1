"""What other packages still import from here; goes when they return DataFrames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers.evaluation.tables import STAGES as STAGES
from helpers.evaluation.tables import percent as percent


class Table:
    """Rows of text, with notes below: aligned in a terminal, a table in a notebook."""

    def __init__(
        self, header: list[str], rows: list[list[str]], notes: Sequence[str] = ()
    ) -> None:
        self.header, self.rows, self.notes = header, rows, notes

    def __repr__(self) -> str:
        lines = [self.header, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        aligned = [
            "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        return "\n".join([*aligned, *self.notes])

    def _repr_html_(self) -> str:
        return render("table.html", table=self)


def render(template: str, **values: Any) -> str:
    """Returns a template of this folder filled in."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(values)
