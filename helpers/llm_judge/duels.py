"""Two models' answers side by side, judged in both orders so that no order decides.

python -m helpers judge-pairs RUN base sft --set test --judge URL --judge-model NAME
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from helpers import runtime
from helpers.data import preparation as data
from helpers.data.formats import Row
from helpers.errors import JudgeError
from helpers.evaluation.results import percent
from helpers.llm_judge.fastchat import find_data, read_prompts
from helpers.llm_judge.judge import (
    Judge,
    add_arguments,
    add_result,
    fill,
    open_judge,
    read_winner,
    unreadable,
)
from helpers.llm_judge.pairwise import count_wins, read_pairs
from helpers.runs import Run, open_run


def settle(forward: str | None, backward: str | None) -> str | None:
    """Returns who wins by the verdicts in both orders: who wins in each, else a tie.

    Args:
        forward: the verdict with the first answer shown first.
        backward: the verdict with the second answer shown first.

    >>> settle("first", "second")  # the same answer, wherever it stood
    'first'
    >>> settle("first", "first")  # whatever stood first
    'tie'
    >>> settle("tie", None) is None
    True
    """
    if forward is None or backward is None:
        return None
    swapped = {"first": "second", "second": "first", "tie": "tie"}[backward]
    return forward if forward == swapped else "tie"


def compare(judge: Judge, pairs: list[Row]) -> list[Row]:
    """Returns the pairs with `winner` (`first`, `second`, `tie`, None) and `judgments`.

    Args:
        judge: asked twice a pair, once in each order.
        pairs: `prompt`, a pairwise one of FastChat's, `fields`, what it needs besides
            the answers, and the answers `first` and `second`.
    """
    asked = [
        fill(pair["prompt"], **pair["fields"], answer_a=pair[a], answer_b=pair[b])
        for pair in pairs
        for a, b in (("first", "second"), ("second", "first"))
    ]
    replies = judge.ask(asked)
    rows = []
    for pair, *both in zip(pairs, replies[::2], replies[1::2], strict=True):
        verdicts = [read_winner(reply.text) for reply in both]
        texts = [reply.text or reply.error for reply in both]
        rows.append({**pair, "winner": settle(*verdicts), "judgments": texts})
    return rows


def compare_models(
    run: Run,
    judge: Judge,
    prompts: dict[str, Row],
    models: tuple[str, str],
    part: str,
    other: Run | None = None,
) -> dict[str, Any]:
    """Judges the second model's answers against the first's and returns the count.

    Problems, which have a right answer, are judged by FastChat's prompt for maths.
    Writes `eval/<second>/<part>_against_<first>.jsonl`, which `pairs` shows.

    Args:
        run: of the first model.
        judge: from `judge.open_judge`.
        prompts: FastChat's, by name, from `fastchat.read_prompts`.
        models: labels of two evaluated models, `base` and `sft` say.
        part: a held-out set, `test_chat` or `test` say.
        other: the run of the second model, where it is another one.

    Raises:
        DataError: the models answered no question in common.
        JudgeError: see `Judge.ask`, or no verdict at all could be read.
        MissingInput: a model has not been evaluated.
    """
    pairs = []
    for n, question, gold, first, second in read_pairs(run, models, part, other):
        row = {"id": n, "first": first["output"], "second": second["output"]}
        maths = "gold" in first
        row["prompt"] = prompts["pair-math-v1" if maths else "pair-v2"]
        fields = {"question": question, "ref_answer_1": gold}
        pairs.append({**row, "fields": fields})
    rows = compare(judge, pairs)
    for row in rows:
        row["prompt"] = row["prompt"]["name"]
    home = other or run
    path = home.path / "eval" / models[1] / f"{part}_against_{models[0]}.jsonl"
    data.write_rows(path, rows)
    found = {**count_wins([row["winner"] for row in rows]), "judge": judge.model}
    if found["missing"] == len(rows):
        texts = [text for row in rows for text in row["judgments"]]
        raise unreadable("verdict", texts, path)
    add_result(home, models[1], path.stem, found)
    return found


def main(arguments: list[str]) -> None:
    """Judges two models of a run, or of two runs, against each other.

    Raises:
        SystemExit: something that the user can mend is wrong; the message says what.
    """
    parser = argparse.ArgumentParser(prog="python -m helpers judge-pairs")
    add_arguments(parser)
    parser.add_argument("models", nargs=2, help="two evaluated models: base sft")
    parser.add_argument("--set", default="test_chat", help="the answers in eval/")
    parser.add_argument("--other", metavar="RUN", help="the second model's run")
    parser.add_argument("--data", type=Path, help="FastChat's llm_judge/data folder")
    given = parser.parse_args(arguments)
    with runtime.exit_on(ValueError, OSError):
        run = open_run(given.run)
        judge = open_judge(run, given.judge, given.judge_model)
        if judge is None:
            raise JudgeError("no judge is named: give --judge URL --judge-model NAME")
        other = open_run(given.other) if given.other else None
        prompts = read_prompts(find_data(given.data))
        models = (given.models[0], given.models[1])
        found = compare_models(run, judge, prompts, models, given.set, other)
    wins = percent(found["wins"]) if found["wins"] else "none decided"
    print(f"{models[1]} better than {models[0]}: {wins}")  # noqa: T201
    print(f"ties: {found['ties']}, no verdict: {found['missing']}")  # noqa: T201
