"""Verdicts and text metrics of answers; intervals of counts, means and differences."""

import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import regex
from sacrebleu.metrics import BLEU, CHRF
from scipy.stats import binomtest, bootstrap
from sklearn.metrics import f1_score

from helpers.data.formats import Row
from helpers.grpo import answers

# lm-evaluation-harness compares strings, by patterns of its task (version 0.4.13)
STRICT, FLEXIBLE = r"#### (-?[0-9.,]+)", r"-?[$0-9.,]{2,}|-?[0-9]+"
IGNORED = re.compile(r"[,$]|\.(?=[,$]*$)")
VERDICTS = ("correct", "strict_match", "flexible_extract", "strict_format")
ROUGE = ("rouge1", "rouge2", "rougeL")
OF_ITEMS = (*ROUGE, "exact_match", "token_f1")
MEASURES = (*VERDICTS, *OF_ITEMS, "loss")
# Each character of the scripts without spaces is a word.
UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
WORD = regex.compile(rf"(?V1){UNSPACED}|[[\p{{L}}\p{{M}}\p{{N}}]--{UNSPACED}]+")


def check_answer(text: str, problem: Row) -> Row:
    """Returns the number extracted from an answer, and the verdicts on it.

    Args:
        text: the model's answer.
        problem: `gold`, `answer` with the line `#### <number>`, and optionally the
            `prompt`: a number copied from there is not *correct*.
    """
    prompt = "\n".join(message["content"] for message in problem.get("prompt", []))
    extracted = answers.extract_answer(answers.own_words(text, prompt))
    return {
        "extracted": None if extracted is None else str(extracted),
        "gold": problem["gold"],
        "correct": answers.is_correct(text, problem["gold"], prompt),
        "strict_match": is_same(re.findall(STRICT, text)[:1], problem["answer"]),
        "flexible_extract": is_same(re.findall(FLEXIBLE, text)[-1:], problem["answer"]),
        "strict_format": answers.has_strict_format(text),
    }


def is_same(match: list[str], answer: str) -> bool:
    """Returns lm-evaluation-harness's verdict on a match, if there is one."""
    right = IGNORED.sub("", answer).rpartition(f"{answers.MARKER} ")[2].lower()
    return [IGNORED.sub("", number) for number in match] == [right]


def split_gain(first: pd.DataFrame, second: pd.DataFrame) -> dict[str, dict[str, int]]:
    """Returns strict matches of one model alone: *by format* if both were correct."""
    counts: dict[str, dict[str, int]] = {"by format": {}, "by reasoning": {}}
    pairs = {"only_first": (first, second), "only_second": (second, first)}
    for side, (own, other) in pairs.items():
        alone = other["correct"][own["strict_match"] & ~other["strict_match"]]
        counts["by format"][side] = int(alone.sum())
        counts["by reasoning"][side] = int((~alone).sum())
    return counts


def score(output: str, reference: str) -> dict[str, float]:
    """Returns ROUGE's F measures, and SQuAD's exact match and F1 (arXiv:1606.05250)."""
    from rouge_score.rouge_scorer import RougeScorer
    from transformers.data.metrics.squad_metrics import normalize_answer

    if output.strip() == reference.strip():  # one word has no ROUGE-2, an emoji no word
        return dict.fromkeys(OF_ITEMS, 1.0) | {"exact_match": True}
    words = SimpleNamespace(tokenize=WORD.findall)  # its own are of ASCII letters alone
    scorer = RougeScorer(ROUGE, tokenizer=words)
    rouge = scorer.score(reference.lower(), output.lower())
    values = {name: rouge[name].fmeasure for name in ROUGE}
    right, plain = normalize_answer(reference), normalize_answer(output)
    values["token_f1"] = scorer.score(right, plain)["rouge1"].fmeasure
    values = {name: round(value, 4) for name, value in values.items()}
    return values | {"exact_match": bool(right) and right == plain}


def judge(text: str, row: Row, labels: Sequence[str] | None) -> Row:
    """Returns the verdicts on an answer to a problem, or its text metrics."""
    values = {k: row[k] for k in ("question", "reference", "loss") if k in row}
    if "gold" in row:
        return values | check_answer(text, row)
    if labels:
        return values | {"correct": text.strip() == row["reference"].strip()}
    return values | score(text, row["reference"])


def summarise(items: list[Row], labels: Sequence[str] | None) -> dict[str, Any]:
    """Returns rates and means of a set's items, and metrics of the whole set."""
    columns, n = {name: [item[name] for item in items] for name in items[0]}, len(items)
    values: dict[str, Any] = {}
    for name in [name for name in MEASURES if name in columns]:
        column = columns[name]
        is_rate = isinstance(column[0], bool)
        values[name] = proportion(sum(column), n) if is_rate else mean(column)
    stopped, tokens = sum(columns["stopped"]), sum(columns["tokens"])
    values |= {"answers": n, "stop_rate": round(stopped / n, 4), "tokens": tokens}
    values["truncated"] = n - stopped
    if "gold" in columns:
        return values
    outputs, right = ([t.strip() for t in columns[k]] for k in ("output", "reference"))
    if labels:
        names = [label.strip() for label in labels]
        classes = [name for name in names if name in {*outputs, *right}]
        options = {"labels": classes, "average": None, "zero_division": 0.0}
        f1 = f1_score(right, outputs, **options).round(4).tolist()
        values["macro_f1"] = round(sum(f1) / len(f1), 4)
        values["no_label"] = sum(output not in names for output in outputs)
        return values | {"f1": dict(zip(classes, f1, strict=True))}
    text, tokenizer = "".join(right), "13a"
    letters = regex.findall(UNSPACED, text)
    if 10 * len(letters) > len(regex.findall(r"\p{L}", text)):
        tokenizer = "zh" if regex.fullmatch(r"\p{Han}+", "".join(letters)) else "char"
    # an answer in another script may be shorter than the four words that BLEU counts
    bleu = BLEU(tokenize=tokenizer, effective_order=not text.isascii())
    for key, metric in (("bleu", bleu), ("chrf", CHRF())):
        result = round(metric.corpus_score(outputs, [right]).score, 2)
        values[key] = {"score": result, "signature": str(metric.get_signature())}
    return values


def proportion(k: int, n: int) -> dict[str, float]:
    """Returns `{"k", "n", "low", "high"}`: a count and its 95 % Wilson interval."""
    low, high = binomtest(k, n).proportion_ci(confidence_level=0.95, method="wilson")
    return {"k": k, "n": n, "low": round(float(low), 4), "high": round(float(high), 4)}


def mean(values: Sequence[float]) -> dict[str, float]:
    """Returns `{"mean", "n", "low", "high"}` with a 95 % bootstrap interval."""
    low, high = min(values), max(values)
    if low != high:
        options = {"method": "percentile", "rng": np.random.default_rng(0)}
        draws = bootstrap((np.asarray(values),), np.mean, batch=500, **options)
        low, high = draws.confidence_interval
    average, low, high = (round(float(x), 4) for x in (np.mean(values), low, high))
    return {"mean": average, "n": len(values), "low": low, "high": high}


def paired_difference(first: Sequence[Any], second: Sequence[Any]) -> dict[str, float]:
    """Returns the mean of second minus first on the same items, with its interval.

    For verdicts, `p` is McNemar's exact two-sided test, the binomial test of the items
    that only one got (Fagerland et al., BMC Med. Res. Methodology 13:91, 2013).
    """
    gains = [b - a for a, b in zip(first, second, strict=True)]
    values = mean(gains)
    values = {"difference": values.pop("mean"), **values}
    if isinstance(first[0], bool):
        lost, won = gains.count(-1), gains.count(1)
        p = binomtest(won, won + lost).pvalue if won + lost else 1.0
        values |= {"only_first": lost, "only_second": won, "p": float(f"{p:.3g}")}
    return values
