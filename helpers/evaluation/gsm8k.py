"""Verdicts on answers to GSM8K problems: ours, and those of lm-evaluation-harness.

*Correct* compares numbers. lm-evaluation-harness compares strings, by the patterns of
its task files (`lm_eval/tasks/gsm8k`, version 0.4.13).
"""

from __future__ import annotations

import re

from helpers.data.formats import Row
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
    prompt = "\n".join(message["content"] for message in problem.get("prompt", []))
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
    """Returns lm-evaluation-harness's strict match of a text with an answer."""
    pattern, place = STRICT[task]
    numbers = re.findall(pattern, text)
    return bool(numbers) and strip(numbers[place]) == reference(answer, task)


def flexible_extract(text: str, answer: str, task: str = "gsm8k") -> bool:
    """Returns its flexible extract: whether the last number is the reference's."""
    numbers = re.findall(NUMBER, text)
    return bool(numbers) and strip(numbers[-1]) == reference(answer, task)


def strip(text: str) -> str:
    return re.sub(r"\.$", "", re.sub(r"[,$]", "", text))


def reference(answer: str, task: str) -> str:
    if task == "gsm8k_cot_llama":
        answer = answer.split(answers.MARKER)[-1].strip()
    return strip(answer).rpartition(f"{answers.MARKER} ")[2].lower()


def split_gain(first: list[Row], second: list[Row]) -> dict[str, dict[str, int]]:
    """Returns the items of two models that differ by strict match, in two kinds.

    An item that one model alone gets is a difference *by format* if the other one had
    the right number too, written another way, and *by reasoning* otherwise.
    """
    kinds = ("by format", "by reasoning")
    counts = {kind: {"only_first": 0, "only_second": 0} for kind in kinds}
    for a, b in zip(first, second, strict=True):
        if a["strict_match"] != b["strict_match"]:
            side, other = ("only_second", a) if b["strict_match"] else ("only_first", b)
            counts["by format" if other["correct"] else "by reasoning"][side] += 1
    return counts
