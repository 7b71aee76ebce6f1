"""GRPO: the answer parser, rewards, problems, trainer and diagnostics."""

import lazy_loader

EXPORTS = {
    "answers": ["extract_answer"],
    "monitor": ["Clock", "LivePanel", "read_group"],
    "trainer": [
        "GreedyEvaluation",
        "build_grpo",
        "grpo_arguments",
        "split_problems",
        "training_prompts",
    ],
}
__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs=EXPORTS)
