"""Text metrics of answers against references, and rates of class labels.

ROUGE is rouge-score's, BLEU and chrF are sacrebleu's. rouge-score reads ASCII alone:
other texts are split by sacrebleu's tokenizer for the script of their reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import regex

from helpers.data.formats import Row
from helpers.evaluation.stats import mean, proportion

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
