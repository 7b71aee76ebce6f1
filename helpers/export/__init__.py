"""Files for other programs, each compared with the model that was trained."""

import lazy_loader

EXPORTS = {
    "card": ["push_to_hub"],
    "formats": ["export", "merge"],
    "parity": ["check", "parity_table"],
}
__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs=EXPORTS)
