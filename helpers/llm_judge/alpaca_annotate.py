# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#   "alpaca_eval==0.6.6",
#   "datasets<4",
#   "lazy-loader",
#   "openai<2",
#   "pandas<3",
#   "scikit-learn<1.8",
#   "setuptools<81",
# ]
# ///
"""Prints the win rate of outputs as JSON; `alpaca_eval.annotate` runs this script.

The package `alpaca_eval` does not work with newer versions than those above, of which
`uv run --script` makes an environment. Of ours it imports `judge`.
"""

from __future__ import annotations

import json
import sys
from functools import partial, wraps
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

from helpers.errors import JudgeError  # noqa: E402
from helpers.llm_judge.judge import complete, without_thoughts  # noqa: E402

sys.path.pop()


def write_config(settings: dict[str, Any], folder: Path) -> Path:
    """Returns the package's configuration of an evaluator, with the judge replaced."""
    import yaml
    from alpaca_eval import constants

    name = settings["evaluator"] or constants.ANNOTATOR_CONFIG_AE2
    home = constants.EVALUATORS_CONFIG_DIR
    text = (home / name / "configs.yaml").read_text(encoding="utf-8")
    (config,) = yaml.safe_load(text).values()
    config["prompt_template"] = str(home / config["prompt_template"])
    options = config["completions_kwargs"]
    options |= {"model_name": settings["model"], "client_kwargs": settings["client"]}
    options["requires_chatml"] = True  # else guessed from the model's name
    if settings["base_url"]:
        options["openai_api_base"] = settings["base_url"]
    path = folder / name / "configs.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    # the package keeps annotations by this name: another judge, other annotations
    key = f"{name} by {settings['model']} at {settings['base_url']}"
    path.write_text(yaml.safe_dump({key: config}), encoding="utf-8")
    return path


def ask_with_care() -> None:
    """Has the package ask and read a judge as `judge.Judge` does."""
    from openai.resources.chat.completions import Completions

    create, refused, sentences = Completions.create, [], []

    @wraps(create)
    def careful(self: Any, **request: Any) -> Any:
        try:
            if not sentences:
                completion = complete(partial(create, self), request, refused)
        except JudgeError as error:
            sentences.append(str(error))
        if sentences:
            sys.exit(sentences[0])  # which the package does not catch
        for choice in completion.choices:
            choice.message.content = without_thoughts(choice.message.content)
        return completion

    Completions.create = careful  # type: ignore[method-assign]


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the win rate, length-controlled too where possible, or why not."""
    import pandas as pd
    from alpaca_eval import metrics
    from alpaca_eval.annotators import PairwiseAnnotator

    ask_with_care()
    ours, theirs = Path(settings["outputs"]), Path(settings["reference"])
    outputs = pd.read_json(ours)
    annotator = PairwiseAnnotator(annotators_config=write_config(settings, ours.parent))
    annotations = annotator.annotate_head2head(pd.read_json(theirs), outputs)
    if not any(pd.notna(row["preference"]) for row in annotations):
        sys.exit(f"no readable verdict in any of {len(annotations)} judgments")
    rates = metrics.get_winrate(annotations)
    names = ["win_rate", "standard_error", "discrete_win_rate", "n_total"]
    result = {name: rates[name] for name in names}
    result["avg_length"] = int(outputs["output"].str.len().mean())
    result["missing"] = len(outputs) - int(rates["n_total"])
    if len(outputs) < settings["whole"]:
        return result | {"not_length_controlled": "needs all of the 805 instructions"}
    try:
        scores = metrics.get_length_controlled_winrate(
            pd.DataFrame(annotations), save_weights_dir=None
        )
    except Exception as error:  # whatever the hub, the fit or a missing row raise
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        return result | {"not_length_controlled": reason}
    names = ["length_controlled_winrate", "lc_standard_error"]
    return result | {name: float(scores[name]) for name in names}


if __name__ == "__main__":
    values = measure(json.loads(sys.argv[1]))
    sys.stdout.write("\n" + json.dumps(values, default=lambda number: number.item()))
