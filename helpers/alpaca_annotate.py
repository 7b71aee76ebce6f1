# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#   "alpaca_eval==0.6.6",
#   "datasets<4",
#   "openai<2",
#   "pandas<3",
#   "scikit-learn<1.8",
#   "setuptools<81",
# ]
# ///
"""Annotates outputs with the package `alpaca_eval`; run by `alpaca.annotate`.

It stands alone: `uv run --script` gives it the environment named above, newer versions
of which the package of 2024 no longer works with, and none of ours.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def write_config(settings: dict[str, Any], folder: Path) -> Path:
    """Returns the package's configuration of an evaluator, put to another judge."""
    import yaml
    from alpaca_eval import constants

    name = settings["evaluator"] or constants.ANNOTATOR_CONFIG_AE2
    home = constants.EVALUATORS_CONFIG_DIR
    text = (home / name / "configs.yaml").read_text(encoding="utf-8")
    (config,) = yaml.safe_load(text).values()
    config["prompt_template"] = str(home / config["prompt_template"])
    config["completions_kwargs"] |= {
        "model_name": settings["model"],
        "requires_chatml": True,  # guessed from the name of the model without it
        "client_kwargs": settings["client"],
    }
    if settings["base_url"]:
        config["completions_kwargs"]["openai_api_base"] = settings["base_url"]
    path = folder / name / "configs.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    # the package keeps annotations by this name: another judge, other annotations
    key = f"{name} by {settings['model']} at {settings['base_url']}"
    path.write_text(yaml.safe_dump({key: config}), encoding="utf-8")
    return path


def annotate(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the win rate, length-controlled too where that can be had, or why not."""
    import alpaca_eval
    import pandas
    from alpaca_eval.metrics import get_length_controlled_winrate

    outputs = Path(settings["outputs"])
    board, annotations = alpaca_eval.evaluate(
        model_outputs=outputs,
        reference_outputs=settings["reference"],
        annotators_config=write_config(settings, outputs.parent),
        fn_metric="get_winrate",
        sort_by="win_rate",
        output_path=outputs.parent / "annotated",
        precomputed_leaderboard=None,
        is_return_instead_of_print=True,
    )
    (row,) = board.to_dict(orient="records")
    found = {
        key: row[key] for key in ("win_rate", "standard_error", "discrete_win_rate")
    }
    found |= {key: int(row[key]) for key in ("n_total", "avg_length")}
    found["missing"] = len(json.loads(outputs.read_text())) - found["n_total"]
    if not settings["whole"]:
        return {**found, "not_length_controlled": "needs all of the 805 instructions"}
    try:
        controlled = get_length_controlled_winrate(
            pandas.DataFrame(annotations), save_weights_dir=None
        )
    except Exception as error:  # whatever the hub, the fit or a missing row raise
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        return {**found, "not_length_controlled": reason}
    names = ("length_controlled_winrate", "lc_standard_error")
    return {**found, **{name: float(controlled[name]) for name in names}}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    result = json.dumps(annotate(given), indent=1)
    Path(given["result"]).write_text(result + "\n", encoding="utf-8")
