"""Verdicts, text metrics and intervals, against their packages and formulas."""

import math
import random

import pandas as pd
import pytest

from benchmarks import gsm8k_agreement
from helpers.evaluation import metrics

# verdicts


def test_our_verdicts_are_those_of_lm_eval_on_changed_and_random_outputs():
    pytest.importorskip("lm_eval")
    draw = random.Random(7)  # other strings than the benchmark's
    problems = [{"answer": f"2 * {n} = {2 * n}\n#### {2 * n}"} for n in (7, 600, -3)]
    outputs = [
        *gsm8k_agreement.change_answers(problems, draw),
        *gsm8k_agreement.random_strings(600, draw),
    ]
    counts = gsm8k_agreement.agreement(outputs)
    assert counts["n"] > 800
    assert counts["strict_agree"] == counts["flexible_agree"] == counts["n"]
    for right in counts["judged_right"].values():  # or it would say little
        assert all(10 < count < counts["n"] - 10 for count in right.values())


QUESTION = "How many hens are there in all, if Ann counts 1080?"


@pytest.mark.parametrize(
    ("text", "verdicts"),
    [
        ("So 1,080.\n#### 1080", (True, True, True, True)),
        ("It is $1,080.", (True, False, True, False)),
        # ours compares numbers, lm-eval strings
        ("So 1080.\n#### 1080.00", (True, False, False, True)),
        # the number of the problem itself, copied
        (QUESTION, (False, False, True, False)),
    ],
)
def test_the_four_verdicts_on_an_answer(text, verdicts):
    prompt = [{"role": "user", "content": QUESTION}]
    problem = {"gold": "1080", "answer": "2 * 540 = 1080\n#### 1080", "prompt": prompt}
    item = metrics.check_answer(text, problem)
    assert tuple(item[name] for name in metrics.VERDICTS) == verdicts


def test_a_strict_gain_is_split_into_format_and_reasoning():
    names = ["correct", "strict_match"]
    right, loose, wrong = (True, True), (True, False), (False, False)
    first = [loose, loose, wrong, right, right, wrong, right]
    second = [right, right, right, wrong, loose, loose, right]
    frames = [pd.DataFrame(items, columns=names) for items in (first, second)]
    assert metrics.split_gain(*frames) == {
        "by format": {"only_first": 1, "only_second": 2},
        "by reasoning": {"only_first": 1, "only_second": 1},
    }


# texts


def summary(labels, *pairs):
    """The metrics of a set of outputs and references."""
    items = []
    for output, reference in pairs:
        row = {"question": "?", "reference": reference}
        ends = {"output": output, "stopped": True, "tokens": 1}
        items.append(ends | metrics.judge(output, row, labels))
    return metrics.summarise(items, labels)


@pytest.mark.parametrize(
    ("output", "reference", "match", "f1"),
    [
        ("", "cat", 0.0, 0.0),
        ("the", "An", 0.0, 0.0),
        ("!", "?", 0.0, 0.0),
        ("🙃", "🙂", 0.0, 0.0),
        (" ... ", "...", 1.0, 1.0),
    ],
)
def test_exact_match_and_token_f1_are_those_of_squad(output, reference, match, f1):
    values = metrics.score(output, reference)
    assert values["exact_match"] == match
    assert values["token_f1"] == pytest.approx(f1, abs=1e-4)


TEXTS = """今天的天气很好，我们去公园。|ねこが古い塀の上にすわっている。|猫|кот|🙂
고양이가 낡은 담 위에 앉아 있다.|แมวนั่งอยู่บนกำแพงเก่า|ឆ្មាអង្គុយលើជញ្ជាំង
बिल्ली पुरानी दीवार पर बैठी है।|القط يجلس على الجدار القديم
Кот сидит на старой стене.|Two birds sat on the old wall."""


@pytest.mark.parametrize("text", TEXTS.replace("\n", "|").split("|"))
def test_a_text_of_any_script_against_itself_has_the_highest_metrics(text):
    values = summary(None, (text, text), (text, text))
    assert values.pop("exact_match") == metrics.proportion(2, 2)
    names = [name for name in metrics.OF_ITEMS if name in values]
    assert [values[name]["mean"] for name in names] == [1.0] * 4
    assert (values["bleu"]["score"], values["chrf"]["score"]) == (100.0, 100.0)


@pytest.mark.parametrize(
    ("output", "reference", "other"),
    [
        ("今天天气很好", "今天天气不好", "昨晚下雨"),
        ("กขคงจฉ", "กขคงจช", "ดตถท"),
        ("кот сидит дома.", "кот сидит там.", "снег идёт."),
        ("answer: 猫", "answer: 猫和狗", "狐"),
        ("größer ist besser", "größer ist gut", "kleine Mäuse"),
    ],
)
def test_what_texts_of_any_script_share_counts_and_the_rest_does_not(
    output, reference, other
):
    for name in ("rouge1", "token_f1"):
        assert 0 < metrics.score(output, reference)[name] < 1
        assert metrics.score(other, reference)[name] == 0


def test_the_metrics_of_english_are_those_of_the_packages():
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer
    from transformers.data.metrics.squad_metrics import compute_exact, compute_f1

    words = "The cats' sitting, mats_2 running don't 3.50 easily; (none) state-of-art"
    draw = random.Random(0)
    pairs = [
        tuple(" ".join(draw.choices(words.split(), k=draw.randint(2, 8))) for _ in "12")
        for _ in range(50)
    ]
    theirs = RougeScorer(metrics.ROUGE)
    for output, reference in pairs:
        rouge = theirs.score(reference, output)
        expected = {name: rouge[name].fmeasure for name in metrics.ROUGE}
        expected["exact_match"] = compute_exact(reference, output)
        expected["token_f1"] = compute_f1(reference, output)
        assert metrics.score(output, reference) == pytest.approx(expected, abs=6e-5)
    outputs, references = (list(side) for side in zip(*pairs, strict=True))
    bleu = sacrebleu.corpus_bleu(outputs, [references]).score
    assert summary(None, *pairs)["bleu"]["score"] == pytest.approx(bleu, abs=6e-3)


@pytest.mark.parametrize(
    ("references", "tokenizer", "effective"),
    [
        (["A cat."], "13a", "no"),
        (["Кот сидит."], "13a", "yes"),
        (["今天很好。", "A cat."], "zh", "yes"),
        (["ねこと犬"], "char", "yes"),
        (["The word 猫 stands for a cat in both of these languages."], "13a", "yes"),
    ],
)
def test_the_result_names_the_tokenizer_of_the_script(references, tokenizer, effective):
    values = summary(None, *((text, text) for text in references))
    assert f"eff:{effective}|tok:{tokenizer}|" in values["bleu"]["signature"]


def test_classes_that_occur_get_f1_and_their_mean():
    references = ["positive", "positive", "positive", "negative", "negative"]
    outputs = [" positive\n", "negative", "I like it", "negative", "positive"]
    pairs = zip(outputs, references, strict=True)
    values = summary(["negative", "positive", "neutral"], *pairs)
    assert values["correct"] == metrics.proportion(2, 5)
    assert (values["macro_f1"], values["no_label"]) == (0.45, 1)
    assert values["f1"] == {"negative": 0.5, "positive": 0.4}


@pytest.mark.parametrize(
    ("output", "label"),
    [
        *(("", "A"), ("the", "A"), ("-1", "1"), ("1.0", "10"), ("C", "C++")),
        *(("C#", "C"), ("yes", "Yes"), ("Yes.", "Yes"), ("a cat", "cat"), ("是", "否")),
    ],
)
def test_a_label_is_compared_as_it_is(output, label):
    values = summary([label, "other"], (output, label), (f"\n {label} ", label))
    assert (values["correct"]["k"], values["no_label"]) == (1, 1)


# intervals


def test_a_proportion_has_the_published_wilson_interval():
    # Newcombe, Statistics in Medicine 17 (1998), 857-872, table I, score method
    interval = metrics.proportion(81, 263)
    assert interval == {"k": 81, "n": 263, "low": 0.2553, "high": 0.3662}


def test_a_paired_difference_has_mcnemars_test_and_an_interval():
    counts = {
        (True, True): 100,
        (True, False): 60,
        (False, True): 100,
        (False,) * 2: 140,
    }
    pairs = [pair for pair, count in counts.items() for _ in range(count)]
    first, second = (list(side) for side in zip(*pairs, strict=True))
    test = metrics.paired_difference(first, second)
    tail = sum(math.comb(160, k) for k in range(61)) / 2**160
    assert test["p"] == pytest.approx(2 * tail, rel=1e-2)
    assert (test["only_first"], test["only_second"], test["n"]) == (60, 100, 400)
    half = 1.96 * math.sqrt((160 - 40**2 / 400) / 400**2)
    ends = (test["low"], test["high"])
    assert test["difference"] == 0.1
    assert ends == pytest.approx((0.1 - half, 0.1 + half), abs=6e-3)
    assert test == metrics.paired_difference(first, second)  # the same draws each time
    assert "p" not in metrics.paired_difference([0.5, 0.25], [1.0, 0.5])
