"""Judges: MT-Bench, AlpacaEval and pairs in both orders."""

import lazy_loader

EXPORTS = {
    "chat_benchmarks": ["run_alpaca_eval", "run_mt_bench"],
    "judge": ["Judge", "open_judge"],
    "pairwise": ["judge_pairs", "side_by_side"],
}
__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs=EXPORTS)
