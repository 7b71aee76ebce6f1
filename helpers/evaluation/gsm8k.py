"""The verdicts on an answer: ours, and those of lm-evaluation-harness by its own rules.

*Correct* (`answers`) compares numbers, so that 1,080.00 is 1080. lm-evaluation-harness
compares strings: it takes a match of a pattern, strips `,`, `$` and one final dot, and
wants the rest to equal the reference letter for letter. Its patterns stand in its task
files (`lm_eval/tasks/gsm8k`, version 0.4.13); `benchmarks/gsm8k_agreement.py` proves
that the verdicts are the same as with its own code.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from helpers.data.formats import Messages
from helpers.evaluation.stats import mean, pass_at_k, proportion
from helpers.grpo import answers

NUMBER = r"-?[$0-9.,]{2,}|-?[0-9]+"
# strict match by protocol: the pattern, and whether its first or last match counts
STRICT = {
    "gsm8k": (r"#### (-?[0-9.,]+)", 0),
    "gsm8k_cot_llama": (rf"The final answer is ({NUMBER})", -1),
}
VERDICTS = ("correct", "strict_match", "flexible_extract", "strict_format")


def judge(text: str, problem: dict[str, Any], protocol: str = "ours") -> dict[str, Any]:
    """Returns what an answer says and the verdicts on it, for an evaluation's item.

    Args:
        text: the model's answer.
        problem: `gold`, `answer` with the line `#### <number>`, and the `prompt`: what
            is copied from there is not *correct*.
        protocol: `ours` is judged by the rules of `gsm8k`.
    """
    rules = "gsm8k" if protocol == "ours" else protocol
    asked: Messages | str = problem.get("prompt", "")
    if not isinstance(asked, str):
        asked = "\n".join(message["content"] for message in asked)
    gold, answer = problem["gold"], problem["answer"]
    extracted = answers.extract_answer(answers.own_words(text, asked))
    return {
        "extracted": None if extracted is None else str(extracted),
        "gold": gold,
        "correct": answers.is_correct(text, gold, asked),
        "strict_match": strict_match(text, answer, rules),
        "flexible_extract": flexible_extract(text, answer, rules),
        "strict_format": answers.has_strict_format(text),
    }


def strict_match(text: str, answer: str, protocol: str = "gsm8k") -> bool:
    """Returns lm-evaluation-harness's strict match of a text with a reference answer.

    >>> strict_match("#### 1,080. Or #### 5", "So 1080.\\n#### 1080")
    True
    >>> strict_match("It is 1080.", "#### 1080"), strict_match("#### 5.0", "#### 5")
    (False, False)
    """
    pattern, place = STRICT[protocol]
    found = re.findall(pattern, text)
    return bool(found) and strip(found[place]) == reference(answer, protocol)


def flexible_extract(text: str, answer: str, protocol: str = "gsm8k") -> bool:
    """Returns its flexible extract: the text's last number is the reference's.

    >>> flexible_extract("$5 and $6, so $11.", "5 + 6 = 11\\n#### 11")
    True
    """
    found = re.findall(NUMBER, text)
    return bool(found) and strip(found[-1]) == reference(answer, protocol)


def strip(text: str) -> str:
    """Returns a text as it is compared: without `,`, `$` and one final dot.

    >>> strip("$1,080.")
    '1080'
    """
    return re.sub(r"\.$", "", re.sub(r"[,$]", "", text))


def reference(answer: str, protocol: str = "gsm8k") -> str:
    """Returns what an extracted text must equal, from a problem's reference answer.

    >>> reference("5 + 6 = 11\\n#### 1,100"), reference("####7", "gsm8k_cot_llama")
    ('1100', '7')
    """
    if protocol == "gsm8k_cot_llama":
        answer = answer.split(answers.MARKER)[-1].strip()
    bare = re.sub(r"[,$]", "", answer)
    return re.sub(r"\.$", "", bare.rpartition(f"{answers.MARKER} ")[2]).lower()


def summarise(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the rates of solved problems, each as a count with its interval.

    `accuracy` is the rate of *correct*; `strict_format` that of a final line
    `#### <number>`; `stop_rate` that of answers that ended by themselves, the others
    being `truncated`.
    """
    n, stopped = len(items), sum(item["stopped"] for item in items)
    rates = {name: proportion(sum(i[name] for i in items), n) for name in VERDICTS}
    return {
        "accuracy": rates.pop("correct"),
        **rates,
        "stop_rate": round(stopped / n, 4),
        "truncated": n - stopped,
        "tokens": sum(item["tokens"] for item in items),
    }


def summarise_samples(groups: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Returns pass@k and maj@k for k of 1, 2, 4, ... and all of the drawn answers.

    maj@k is the rate of problems whose most frequent number among the first k answers
    is right (Wang et al., arXiv:2203.11171); of equally frequent ones the first given.

    Args:
        groups: the items of each problem, as many of each.
    """
    n = len(groups[0])
    found: dict[str, Any] = {"answers": n}
    for k in sorted({2**power for power in range(n.bit_length())} | {n}):
        chances = [pass_at_k(n, sum(i["correct"] for i in g), k) for g in groups]
        found[f"pass@{k}"] = mean(chances)
        if k > 2:  # of two, the majority is the first
            right = sum(majority_is_right(group[:k]) for group in groups)
            found[f"maj@{k}"] = proportion(right, len(groups))
    return found


def majority_is_right(items: list[dict[str, Any]]) -> bool:
    """Returns whether the number that most answers give is right.

    >>> said = [("3", True), ("4", False), (None, False), ("3", True)]
    >>> majority_is_right([{"extracted": e, "correct": c} for e, c in said])
    True
    """
    given = [item for item in items if item["extracted"] is not None]
    if not given:
        return False
    winner = Counter(item["extracted"] for item in given).most_common(1)[0][0]
    return next(i["correct"] for i in given if i["extracted"] == winner)


def gain(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> dict[str, int]:
    """Returns where a gain under the strict match comes from: format or reasoning.

    An item that only the second model gets is a *format* gain where the first had the
    right number too, written another way, and a *reasoning* gain where it had not. An
    item that only the first gets is a loss of the same kinds. So `strict_match`, the
    second's count minus the first's, is `format` plus `reasoning`, exactly.

    Args:
        first: items of one model.
        second: items of the other, on the same problems in the same order.
    """
    counts: Counter[str] = Counter()
    for a, b in zip(first, second, strict=True):
        if a["strict_match"] != b["strict_match"]:
            other, sign = (a, "gained") if b["strict_match"] else (b, "lost")
            counts[f"{'format' if other['correct'] else 'reasoning'}_{sign}"] += 1
    found = {
        kind: counts[f"{kind}_gained"] - counts[f"{kind}_lost"]
        for kind in ("format", "reasoning")
    }
    names = [f"{kind}_{sign}" for kind in found for sign in ("gained", "lost")]
    total = sum(found.values())
    return {"strict_match": total, **found, **{name: counts[name] for name in names}}
