"""Verdicts on answers to GSM8K problems: ours, and those of lm-evaluation-harness.

*Correct* (`grpo.answers`) compares numbers: 1,080.00 is 1080. lm-evaluation-harness
compares strings, by the patterns of its task files (`lm_eval/tasks/gsm8k`, version
0.4.13); `benchmarks/gsm8k_agreement.py` checks our verdicts against its own code.
"""

from __future__ import annotations

import re
from typing import Any

from helpers.data.formats import Messages, Row
from helpers.evaluation.stats import proportion
from helpers.grpo import answers

NUMBER = r"-?[$0-9.,]{2,}|-?[0-9]+"
# strict match by task: the pattern, and the index of the match that counts
STRICT = {
    "gsm8k": (r"#### (-?[0-9.,]+)", 0),
    "gsm8k_cot_llama": (rf"The final answer is ({NUMBER})", -1),
}
VERDICTS = ("correct", "strict_match", "flexible_extract", "strict_format")


def check_answer(text: str, problem: Row) -> Row:
    """Returns the number extracted from an answer, and the verdicts on it.

    Args:
        text: the model's answer.
        problem: `gold`, `answer` with the line `#### <number>`, and optionally the
            `prompt`: a number copied from there is not *correct*.
    """
    prompt: Messages | str = problem.get("prompt", "")
    if not isinstance(prompt, str):
        prompt = "\n".join(message["content"] for message in prompt)
    gold, answer = problem["gold"], problem["answer"]
    extracted = answers.extract_answer(answers.own_words(text, prompt))
    return {
        "extracted": None if extracted is None else str(extracted),
        "gold": gold,
        "correct": answers.is_correct(text, gold, prompt),
        "strict_match": strict_match(text, answer),
        "flexible_extract": flexible_extract(text, answer),
        "strict_format": answers.has_strict_format(text),
    }


def strict_match(text: str, answer: str, task: str = "gsm8k") -> bool:
    """Returns lm-evaluation-harness's strict match of a text with a reference answer.

    >>> strict_match("#### 1,080. Or #### 5", "So 1080.\\n#### 1080")
    True
    >>> strict_match("It is 1080.", "#### 1080"), strict_match("#### 5.0", "#### 5")
    (False, False)
    """
    pattern, place = STRICT[task]
    numbers = re.findall(pattern, text)
    return bool(numbers) and strip(numbers[place]) == reference(answer, task)


def flexible_extract(text: str, answer: str, task: str = "gsm8k") -> bool:
    """Returns its flexible extract: whether the last number is the reference's.

    >>> flexible_extract("$5 and $6, so $11.", "5 + 6 = 11\\n#### 11")
    True
    """
    numbers = re.findall(NUMBER, text)
    return bool(numbers) and strip(numbers[-1]) == reference(answer, task)


def strip(text: str) -> str:
    """Returns a text without `,`, `$` and one final dot."""
    return re.sub(r"\.$", "", re.sub(r"[,$]", "", text))


def reference(answer: str, task: str) -> str:
    """Returns the string that an extracted text must equal.

    >>> reference("5 + 6 = 11\\n#### 1,100", "gsm8k")
    '1100'
    """
    if task == "gsm8k_cot_llama":
        answer = answer.split(answers.MARKER)[-1].strip()
    return strip(answer).rpartition(f"{answers.MARKER} ")[2].lower()


def summarise_verdicts(items: list[Row]) -> dict[str, Any]:
    """Returns the rates of the verdicts, with intervals; `accuracy` is of *correct*."""
    n = len(items)
    rates = {name: proportion(sum(i[name] for i in items), n) for name in VERDICTS}
    return {"accuracy": rates.pop("correct"), **rates}


def split_gain(first: list[Row], second: list[Row]) -> dict[str, int]:
    """Returns a gain under the strict match, split into format and reasoning.

    An item that only the second model gets is a *format* gain if the first one had the
    right number too, written another way, and a *reasoning* gain otherwise; an item
    that only the first gets is a loss of the same kinds. So `strict_match`, the
    difference of the counts, is exactly `format` plus `reasoning`.

    Args:
        first: the items of one model.
        second: those of the other, on the same problems in the same order.
    """
    kinds = ("format_gained", "format_lost", "reasoning_gained", "reasoning_lost")
    counts = dict.fromkeys(kinds, 0)
    for a, b in zip(first, second, strict=True):
        if a["strict_match"] != b["strict_match"]:
            other, sign = (a, "gained") if b["strict_match"] else (b, "lost")
            counts[f"{'format' if other['correct'] else 'reasoning'}_{sign}"] += 1
    by_format = counts["format_gained"] - counts["format_lost"]
    by_reasoning = counts["reasoning_gained"] - counts["reasoning_lost"]
    net = {"format": by_format, "reasoning": by_reasoning}
    return {"strict_match": by_format + by_reasoning, **net, **counts}
