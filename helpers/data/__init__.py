"""Rows in any format -> conversations -> train, eval and test splits."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "formats": ["ask", "detect_format"],
        "sources": ["load_rows"],
        "reading": ["to_conversations"],
        "preparation": ["ensure_data", "prepare"],
    },
)
