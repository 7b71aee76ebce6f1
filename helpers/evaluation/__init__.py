"""Held-out metrics: answers and verdicts, intervals and paired tests, tables, plots."""

import lazy_loader

EXPORTS = {
    "evaluator": ["compare", "evaluate_run"],
    "metrics": ["check_answer"],
    "tables": [
        "differences_table",
        "plot_results",
        "results_table",
        "runs_table",
        "scores_table",
    ],
}
__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs=EXPORTS)
