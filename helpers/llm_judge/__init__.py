"""Judges: MT-Bench, AlpacaEval and pairs in both orders."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={},
)
