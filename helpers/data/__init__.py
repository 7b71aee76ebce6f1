"""Rows in any format -> conversations -> train, eval and test splits."""

import lazy_loader

EXPORTS = {
    "formats": ["ask", "detect_format"],
    "sources": ["load_rows"],
    "reading": ["to_conversations"],
    "preparation": ["ensure_data", "prepare"],
}
__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs=EXPORTS)
