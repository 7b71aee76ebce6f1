"""Models, tokenizers and LoRA adapters: loaded, saved, merged."""

import lazy_loader

EXPORTS = {"load": ["load_model", "load_tokenizer", "options"]}
__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs=EXPORTS)
