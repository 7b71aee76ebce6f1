"""Judges: MT-Bench, AlpacaEval and pairs in both orders."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "alpaca_eval": ["run_alpaca_eval"],
        "judge": ["Judge", "open_judge"],
        "mt_bench": ["run_mt_bench"],
        "pairwise": ["judge_pairs", "side_by_side"],
    },
)
