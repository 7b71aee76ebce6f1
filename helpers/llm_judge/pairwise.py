"""Two models' answers to the same questions: paired, judged, shown side by side."""

import html
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import HTML

from helpers.data.formats import Messages
from helpers.data.preparation import parts_of
from helpers.errors import DataError, JudgeError
from helpers.evaluation.metrics import proportion
from helpers.evaluation.tables import percent
from helpers.files import read_rows
from helpers.llm_judge import judge as judges
from helpers.runs import Run, writes

SWAPPED = {None: None, "first": "second", "second": "first", "tie": "tie"}
PIECE = r"\w+|[^\w\s]"
CELL = '<div style="min-width:9em;white-space:pre-wrap;text-align:left">{}</div>'


def read_pairs(
    run: Run, models: tuple[str, str], part: str | None = None, other: Run | None = None
) -> pd.DataFrame:
    """Returns questions with both models' items, by suffix; `title` has the answer."""
    first, second = models
    one, two = run.require(f"eval/{first}"), (other or run).require(f"eval/{second}")
    parts = [part] if part else parts_of(run.config.data)
    names = [f"{name}.jsonl" for name in parts]
    names = [name for name in names if (one / name).exists() and (two / name).exists()]
    if not names:
        raise DataError(f"{first} and {second} have no {part or 'set'} in common")
    items = [pd.DataFrame(read_rows(folder / names[0])) for folder in (one, two)]
    a, b = (each.drop_duplicates("id") for each in items)  # a problem may come twice
    pairs = a.merge(b, on="id", suffixes=("_first", "_second"))
    titles = pairs["question_first"]
    is_same = not pairs.empty and (titles == pairs["question_second"]).all()
    if not is_same or {*a} != {*b}:
        text = f"answered {names[0]} with other data or other evaluation.labels"
        raise DataError(f"{first} and {second} {text}: evaluate both again")
    if (answers := pairs.get("gold_first", pairs.get("reference_first"))) is not None:
        titles = titles + "\nexpected: " + answers
    return pairs.assign(title=titles)


def count_wins(winners: Iterable[str | None]) -> dict[str, Any]:
    """Returns the second model's wins as a share of the decided pairs, ties apart."""
    counts = Counter(winners)
    wins, losses, ties = (counts[name] for name in ("second", "first", "tie"))
    share = proportion(wins, wins + losses) if wins + losses else None
    return {"wins": share, "losses": losses, "ties": ties, "missing": counts[None]}


def pair_prompts(pairs: pd.DataFrame) -> list[Messages]:
    """Returns what a judge reads: two prompts a pair of `read_pairs`, in either order.

    Problems, which have a right answer, are judged by FastChat's prompt for maths.
    """
    name = "pair-math-v1" if "gold_first" in pairs else "pair-v2"
    prompt, prompts = judges.read_fastchat()[2][name], []
    for pair in pairs.to_dict("records"):
        outputs = pair["output_first"], pair["output_second"]
        for a, b in (outputs, outputs[::-1]):
            fields = {"question": pair["question_first"], "answer_a": a, "answer_b": b}
            fields["ref_answer_1"] = pair.get("gold_first", "")
            prompts.append(judges.fill(prompt, **fields))
    return prompts


@writes
def judge_pairs(
    run: Run,
    labels: tuple[str, str],
    judge: judges.Judge | None,
    *,
    part: str = "test_chat",
    other: Run | None = None,
    limit: int | None = None,
) -> pd.DataFrame:
    """Returns how often the second model's answers beat the first's, in both orders.

    Writes `eval/<second>/<part>_against_<first>.jsonl` and the report.

    Args:
        run: of the first model.
        labels: of two evaluated models, `base` and `sft` say.
        judge: from `open_judge`.
        part: a held-out set.
        other: the run of the second model, where it is another one.
        limit: of pairs, the first of the set.

    Raises:
        DataError, MissingInput: the models have not answered the same questions.
        JudgeError: no judge is configured or answers, or no verdict is readable.
    """
    if judge is None:
        raise JudgeError(judges.UNJUDGED)
    pairs = read_pairs(run, labels, part, other).head(limit or None)
    replies, rows, by_position = judge.ask(pair_prompts(pairs)), [], 0
    for number, *both in zip(pairs["id"], replies[::2], replies[1::2], strict=True):
        forward, swapped = (judges.read_winner(text) for text, _ in both)
        verdicts = {forward, SWAPPED[swapped]}
        by_position += verdicts == {"first", "second"}
        winner = forward if len(verdicts) == 1 else "tie"
        row = {"id": number, "winner": None if None in verdicts else winner}
        rows.append(row | {"judgment": [text or reason for text, reason in both]})
    home, (first, second) = other or run, labels
    path = home.path / "eval" / second / f"{part}_against_{first}.jsonl"
    judges.write_judgments(path, rows, "winner")
    counts = count_wins(row["winner"] for row in rows) | {"judge": judge.model}
    counts["by_position"] = by_position  # ties as the same place won in both orders
    judges.add_result(home, second, path.stem, counts)
    wins = percent(counts["wins"]) if counts["wins"] else "none decided"
    return pd.DataFrame({f"{second} against {first}": counts | {"wins": wins}}).T


def mark_words(text: str, other: str) -> str:
    """Returns a text as HTML, with the words that the other text lacks marked."""
    known, words = set(re.findall(PIECE, other)), re.split(f"({PIECE})", text)
    for n, word in enumerate(words):
        new = word.strip() and word not in known
        words[n] = f"<mark>{html.escape(word)}</mark>" if new else html.escape(word)
    return "".join(words)


def side_by_side(
    run: Run,
    models: tuple[str, str],
    part: str | None = None,
    *,
    count: int = 20,
    only: str | None = None,
) -> HTML:
    """Returns two models' answers to the same questions, as a table to scroll.

    Args:
        run, models: a run and labels of two models evaluated in it.
        part: a held-out set; by default the first that both have answered.
        count: of pairs shown, in the order of the held-out set.
        only: `first`, `second` or `tie`: shows only the pairs so decided, by `correct`
            of the items, or `rougeL` where they have none.

    Raises:
        DataError, MissingInput: as `judge_pairs`.
    """
    pairs, (first, second) = read_pairs(run, models, part), map(html.escape, models)
    by = "correct" if "correct_first" in pairs else "rougeL"
    gains = pairs[f"{by}_second"].astype(float) - pairs[f"{by}_first"].astype(float)
    names = {"first": first, "second": second, "tie": "equal"}
    if only and only not in names:
        raise DataError(f"only={only!r}: expected {', '.join(names)}, or None for all")
    better = np.sign(gains).map({-1: first, 1: second, 0: "equal"})
    summary = ", ".join(f"{name} {n}" for name, n in Counter(better).items())
    shown = (pairs[better == names[only]] if only else pairs).head(count)
    table = shown[["title"]].map(html.escape).assign(better=better[shown.index])
    one, two = shown["output_first"], shown["output_second"]
    table[first] = list(map(mark_words, one, two))
    table[second] = list(map(mark_words, two, one))
    cells = table.map(CELL.format)
    text = cells.to_html(escape=False, index=False, formatters=[str] * 4)  # str: uncut
    scrolled = '<div tabindex="0" style="max-height:480px;overflow:auto">'
    return HTML(f"<b>better by {by}: {summary}</b>{scrolled}{text}</div>")
