"""Forms for notebooks: the config, a chat, and the blind comparison."""

import lazy_loader

EXPORTS = {
    "answer_forms": ["BlindForm", "ChatForm", "blind_results"],
    "config_form": ["ConfigForm"],
}
__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs=EXPORTS)
