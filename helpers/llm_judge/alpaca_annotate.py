# /// script
# dependencies = ["alpaca_eval==0.6.6", "datasets<4", "openai<2", "pandas<3",
#   "scikit-learn<1.8", "setuptools<81"]
# ///
"""Prints the win rate of outputs as JSON; `alpaca_eval.annotate` runs this script in an
environment of the package `alpaca_eval`, which works with no newer versions.
"""

import json
import sys
from pathlib import Path
from typing import Any


def write_config(
    folder: Path, model: str, url: str | None, evaluator: str | None, client: Any
) -> Path:
    """Returns the package's configuration of an evaluator, with the judge replaced."""
    import yaml
    from alpaca_eval.constants import ANNOTATOR_CONFIG_AE2, EVALUATORS_CONFIG_DIR

    name = evaluator or ANNOTATOR_CONFIG_AE2
    path, theirs = folder / name / "configs.yaml", EVALUATORS_CONFIG_DIR
    (config,) = yaml.safe_load((theirs / name / path.name).read_text()).values()
    if config.get("fn_completion_parser") not in ("logprob_parser", "ranking_parser"):
        sys.exit(f"{name} may read a verdict in a judge's thoughts")
    config["prompt_template"] = str(theirs / config["prompt_template"])
    options = config["completions_kwargs"]
    # the form of prompts is else guessed from the model's name
    options |= {"model_name": model, "client_kwargs": client, "requires_chatml": True}
    options["openai_api_base"] = url or "https://api.openai.com/v1"
    path.parent.mkdir(parents=True, exist_ok=True)
    # the package keeps annotations by this name: another judge, other annotations
    path.write_text(yaml.safe_dump({f"{name} by {model} at {url}": config}))
    return path


def measure(outputs: str, reference: str, *settings: Any) -> dict[str, Any]:
    """Returns the win rate, length-controlled too where the package can do that."""
    import pandas as pd
    from alpaca_eval.annotators import PairwiseAnnotator
    from alpaca_eval.metrics import get_length_controlled_winrate, get_winrate

    ours, theirs = pd.read_json(outputs), pd.read_json(reference)
    config = write_config(Path(outputs).parent, *settings)
    rows = PairwiseAnnotator(annotators_config=config).annotate_head2head(theirs, ours)
    if all(pd.isna(row["preference"]) for row in rows):
        sys.exit(f"no readable verdict in any of {len(rows)} judgments")
    result = get_winrate(rows)
    result["avg_length"] = int(ours["output"].str.len().mean())
    result["missing"] = len(ours) - int(result["n_total"])
    if len(ours) < 805:
        return result | {"not_length_controlled": "needs all of the 805 instructions"}
    try:
        return result | get_length_controlled_winrate(rows, save_weights_dir=None)
    except Exception as error:  # whatever the hub, the fit or a missing row raise
        return result | {"not_length_controlled": repr(error)[:200]}


if __name__ == "__main__":
    values = measure(*json.loads(sys.argv[1]))
    sys.stdout.write("\n" + json.dumps(values, default=lambda number: number.item()))
