"""SFT: trainer arguments, resume, callbacks, plots."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "trainer": ["attach_lora", "fit", "load_for_training", "lora_arguments"],
        "sft": ["PROMPTS", "label_rows", "sft_arguments"],
        "callbacks": ["BestAdapter", "LiveSamples", "SkippedSteps", "TimedSaves"],
    },
)
