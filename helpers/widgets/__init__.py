"""Forms for notebooks: the config, a chat, and the blind comparison."""

import lazy_loader

EXPORTS = {
    "blind_form": ["BlindForm", "blind_results"],
    "chat_form": ["ChatForm"],
    "config_form": ["ConfigForm"],
}
__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs=EXPORTS)
