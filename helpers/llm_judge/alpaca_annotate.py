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
of which the package of 2024 no longer works with. Of ours it reads `replies.py`.
"""

from __future__ import annotations

import functools
import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
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


def ask_with_care(model: str) -> None:
    """Has the package ask and read a judge as `judge.Judge` does.

    Refusals end the program with their sentence, options are sent as the server wants
    them, and thoughts are cut out of an answer before it is read.
    """
    import openai
    from openai.resources.chat.completions import Completions

    spec = spec_from_file_location("replies", Path(__file__).with_name("replies.py"))
    assert spec and spec.loader
    replies = module_from_spec(spec)
    spec.loader.exec_module(replies)
    create = Completions.create
    refused: list[Any] = []
    ended: list[str] = []

    @functools.wraps(create)
    def careful(self: Any, **options: Any) -> Any:
        if ended:
            sys.exit(ended[0])
        for error in refused:
            options = replies.adapted(options, error) or options
        while True:
            try:
                completion = create(self, **options)
                break
            except openai.APIStatusError as error:
                other = replies.adapted(options, error)
                if other is None:
                    sentence = replies.refusal(error, self._client.base_url, model)
                    if sentence:
                        ended.append(sentence)
                        sys.exit(sentence)  # which the package does not catch
                    raise
                options = other
                refused.append(error)
        for choice in completion.choices:
            choice.message.content = replies.without_thoughts(choice.message.content)
        return completion

    Completions.create = careful  # type: ignore[method-assign]


def count_wins(annotations: Any) -> dict[str, float]:
    """Returns the package's win rate; ends the program where no verdict was read."""
    import pandas
    from alpaca_eval.metrics import get_winrate

    if not any(pandas.notna(row["preference"]) for row in annotations):
        sys.exit(
            f"the judge gave no readable verdict in any of {len(annotations)} "
            "judgments: take one that answers and keeps to the format; one without "
            "log-probabilities needs --evaluator alpaca_eval_gpt4"
        )
    return get_winrate(annotations)


def annotate(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the win rate, length-controlled too where that can be had, or why not."""
    import alpaca_eval
    import pandas
    from alpaca_eval.metrics import get_length_controlled_winrate

    ask_with_care(settings["model"])
    outputs = Path(settings["outputs"])
    board, annotations = alpaca_eval.evaluate(
        model_outputs=outputs,
        reference_outputs=settings["reference"],
        annotators_config=write_config(settings, outputs.parent),
        fn_metric=count_wins,
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
    try:
        values = annotate(given)
    except SystemExit as end:
        values = {"refusal": end.code}
    result = json.dumps(values, indent=1)
    Path(given["result"]).write_text(result + "\n", encoding="utf-8")
