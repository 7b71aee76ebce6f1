"""Forms for notebooks: the config and the blind comparison."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "blind_form": ["blind_results", "rate_blind"],
        "config_form": ["ConfigForm"],
    },
)
