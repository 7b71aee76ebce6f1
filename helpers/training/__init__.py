"""Training: arguments, labelled rows, callbacks, and a `fit` that survives a kill."""

import lazy_loader

EXPORTS = {
    "trainer": [
        "attach_lora",
        "fit",
        "load_for_training",
        "lora_arguments",
        "label_rows",
        "sft_arguments",
    ],
    "layout": ["choose_layout"],
    "callbacks": ["BestAdapter", "LiveSamples"],
}
__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs=EXPORTS)
