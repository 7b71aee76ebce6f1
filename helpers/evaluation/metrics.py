"""Verdicts and text metrics of answers; intervals of counts, means and differences.

*Correct* compares numbers. lm-evaluation-harness compares strings, by the patterns of
its task files (`lm_eval/tasks/gsm8k`, version 0.4.13). ROUGE is rouge-score's, BLEU
and chrF are sacrebleu's. rouge-score reads ASCII alone: other texts are split by
sacrebleu's tokenizer for the script of their reference.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import regex

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


# texts

ROUGE = ("rouge1", "rouge2", "rougeL")
OF_ITEMS = (*ROUGE, "exact_match", "token_f1")
# scripts without spaces between words
UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"


def script_tokenizer(text: str) -> str:
    """Returns the name of sacrebleu's tokenizer that reads a text's script."""
    letters = regex.findall(UNSPACED, text)
    if len(letters) < max(1, 0.1 * len(regex.findall(r"\p{L}", text))):
        return "13a"
    return "zh" if regex.fullmatch(r"\p{Han}+", "".join(letters)) else "char"


class Words:
    """A tokenizer for rouge-score: sacrebleu's for the script of a text."""

    def __init__(self, text: str) -> None:
        from sacrebleu.metrics import BLEU

        self.split = BLEU(tokenize=script_tokenizer(text)).tokenizer

    def tokenize(self, text: str) -> list[str]:
        """Returns the words of a text in lower case, without its punctuation."""
        words = self.split(text.lower()).split()
        return [word for word in words if regex.search(r"[\p{L}\p{M}\p{N}]", word)]


def score(output: str, reference: str) -> dict[str, float]:
    """Returns the metrics of one answer, each from 0 to 1; ROUGE is the F measure.

    Exact match and F1 are SQuAD's (Rajpurkar et al., arXiv:1606.05250).
    """
    from rouge_score.rouge_scorer import RougeScorer
    from transformers.data.metrics.squad_metrics import compute_f1, normalize_answer

    same = output.strip() == reference.strip()
    if same and not reference.isascii():  # one word has no ROUGE-2, an emoji no word
        return dict.fromkeys(OF_ITEMS, 1.0)
    words, english = Words(reference), (output + reference).isascii()
    scorer = RougeScorer(ROUGE, use_stemmer=True, tokenizer=None if english else words)
    rouge = scorer.score(reference, output)
    plain, right = (normalize_answer(text) for text in (output, reference))
    texts = [" ".join(words.tokenize(text)) for text in (right, plain)]
    match, f1 = plain == right, compute_f1(*texts)
    if not texts[0]:  # no words: SQuAD's metrics would take any two texts for equal
        match = f1 = same
    values = {name: rouge[name].fmeasure for name in ROUGE}
    values |= {"exact_match": match, "token_f1": f1}
    return {name: round(float(value), 4) for name, value in values.items()}


def summarise_texts(items: Sequence[Row]) -> dict[str, Any]:
    """Returns the text metrics of a set: means with intervals, BLEU and chrF of all."""
    from sacrebleu.metrics import BLEU, CHRF

    outputs = [item["output"] for item in items]
    references = [item["reference"] for item in items]
    values: dict[str, Any] = {n: mean([item[n] for item in items]) for n in OF_ITEMS}
    name = script_tokenizer("".join(references))
    # an answer in another script may be shorter than the four words that BLEU counts
    short = not all(text.isascii() for text in references)
    bleu = BLEU(tokenize=name, effective_order=short)
    for key, metric in (("bleu", bleu), ("chrf", CHRF())):
        result = round(metric.corpus_score(outputs, [references]).score, 2)
        values[key] = {"score": result, "signature": str(metric.get_signature())}
    return values


def summarise_labels(items: Sequence[Row], labels: Sequence[str]) -> dict[str, Any]:
    """Returns the right answers, and F1 of the classes that occur and their mean.

    An answer that is not a label counts as wrong, and for no class.
    """
    from sklearn.metrics import f1_score

    answers = [item["output"].strip() for item in items]
    right = [item["reference"].strip() for item in items]
    names = [label.strip() for label in labels]
    classes = [name for name in names if name in {*right, *answers}]
    f1 = f1_score(right, answers, labels=classes, average=None, zero_division=0.0)
    hits = sum(a == b for a, b in zip(right, answers, strict=True))
    return {
        "correct": proportion(hits, len(right)),
        "macro_f1": round(float(f1.mean()), 4),
        "no_label": sum(answer not in names for answer in answers),
        "f1": dict(zip(classes, f1.round(4).tolist(), strict=True)),
    }


# intervals


def proportion(k: int, n: int) -> dict[str, float]:
    """Returns `{"k", "n", "low", "high"}`: a count and its 95 % Wilson interval."""
    from scipy.stats import binomtest

    interval = binomtest(k, n).proportion_ci(confidence_level=0.95, method="wilson")
    low, high = round(float(interval.low), 4), round(float(interval.high), 4)
    return {"k": k, "n": n, "low": low, "high": high}


def mean(values: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Returns `{"mean", "n", "low", "high"}` with a 95 % bootstrap interval.

    The percentile interval (Efron and Tibshirani, An Introduction to the Bootstrap,
    1993, section 13.3), by resampling the values.
    """
    import numpy as np
    from scipy.stats import bootstrap

    low, high = min(values), max(values)
    if low != high:
        options = {"method": "percentile", "rng": np.random.default_rng(seed)}
        draws = bootstrap((np.asarray(values),), np.mean, batch=500, **options)
        low, high = draws.confidence_interval
    ends = {"low": round(float(low), 4), "high": round(float(high), 4)}
    return {"mean": round(float(np.mean(values)), 4), "n": len(values), **ends}


def paired_difference(first: Sequence[Any], second: Sequence[Any]) -> dict[str, float]:
    """Returns how two models' verdicts or metrics on the same items differ.

    `difference` is the mean of second minus first, with a 95 % bootstrap interval. For
    verdicts, `p` is McNemar's exact two-sided test, the binomial test of the items that
    one model alone got right (Fagerland et al., BMC Med. Res. Methodology 13:91, 2013).
    """
    from scipy.stats import binomtest

    gains = [b - a for a, b in zip(first, second, strict=True)]
    values = mean(gains)
    values = {"difference": values.pop("mean"), **values}
    if isinstance(first[0], bool):
        lost, won = gains.count(-1), gains.count(1)
        p = binomtest(won, won + lost).pvalue if won + lost else 1.0
        values |= {"only_first": lost, "only_second": won, "p": float(f"{p:.3g}")}
    return values
