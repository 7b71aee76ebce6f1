"""Answers of a model: batched, streamed, or sampled for GRPO from a fast copy."""

import lazy_loader

EXPORTS = {
    "generation": ["generate", "reply"],
    "sampler": ["Sampler", "choose_sampler"],
}
__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs=EXPORTS)
