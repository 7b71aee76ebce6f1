"""A fast sampler for GRPO: a 16-bit copy with the adapter folded in, CUDA graphs."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={"sampler": ["Sampler", "choose_sampler"]},
)
