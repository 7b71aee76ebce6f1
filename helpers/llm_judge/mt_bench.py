"""MT-Bench: 80 questions of two turns, answered by a run's models, rated by a judge.

Questions, reference answers and prompts are FastChat's and are read from its files;
answers and judgments are written in its formats, so that its own tools read them too.

    python -m helpers mt-bench RUN --models base sft --judge URL --judge-model NAME
"""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from helpers import runtime
from helpers.data import preparation as data
from helpers.data.formats import Messages, Row
from helpers.errors import DataError
from helpers.evaluation.evaluator import model_print
from helpers.llm_judge import judge
from helpers.llm_judge.fastchat import (
    find_data,
    read_prompts,
    read_questions,
    read_references,
)
from helpers.llm_judge.judge import Judge
from helpers.llm_judge.scores import draw_radar, show_scores, summarise
from helpers.models import load as models
from helpers.runs import Run, fingerprint

# `temperature_config` and `NEED_REF_CATS` of fastchat/llm_judge/common.py
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
WITH_REFERENCE = ("math", "reasoning", "coding")


def answer(
    run: Run,
    label: str,
    adapter: Path | str | None,
    questions: list[Row],
    *,
    max_new_tokens: int = 1024,
) -> dict[int, Row]:
    """Returns one model's answers in FastChat's format, by question.

    Writes `eval/<label>/mt_bench.jsonl` after each temperature, hottest first; an
    answer that is there, and of the same weights and settings, is not made again.

    Args:
        run: whose model answers.
        label: `base`, `sft`, `grpo`.
        adapter: on the base model; None answers with the base.
        questions: from `read_questions`.
        max_new_tokens: a turn is cut here; 1,024 is FastChat's.
    """
    path = run.path / "eval" / label / "mt_bench.jsonl"
    seed = run.config.seed
    key = fingerprint(model_print(run.config, adapter), max_new_tokens, seed)
    keys = {q["question_id"]: key + fingerprint(q["turns"]) for q in questions}
    answers = {}  # with those to questions that are not asked this time
    for row in data.read_rows(path) if path.exists() else []:
        number, made = row["question_id"], row["answer_id"]
        if made.startswith(key) and made == keys.get(number, made):
            answers[number] = row
    groups = defaultdict(list)
    for question in questions:
        if question["question_id"] not in answers:
            # 0.7 for categories that are not MT-Bench's, as FastChat
            groups[TEMPERATURES.get(question["category"], 0.7)].append(question)
    if not groups:
        return {number: answers[number] for number in keys}
    options = models.options(run.config)
    options["max_length"] = max(run.config.max_length, 4 * max_new_tokens)
    model, tokenizer = models.load_model(run.config.model, adapter=adapter, **options)
    for temperature, group in sorted(groups.items(), reverse=True):
        runtime.seed_everything(seed)
        turns = converse(
            model,
            tokenizer,
            [question["turns"] for question in group],
            batch_size=run.config.evaluation.batch_size,
            max_new_tokens=max_new_tokens,
            sampling={"temperature": temperature} if temperature else None,
        )
        for question, said in zip(group, turns, strict=True):
            number = question["question_id"]
            answers[number] = {
                "question_id": number,
                "answer_id": keys[number],
                "model_id": f"{run.config.name}-{label}",
                "choices": [{"index": 0, "turns": said}],
                "tstamp": time.time(),
            }
        data.write_rows(path, [answers[n] for n in sorted(answers)])
    del model
    runtime.free_memory()
    return {number: answers[number] for number in keys}


def converse(
    model: Any, tokenizer: Any, questions: list[list[str]], **options: Any
) -> list[list[str]]:
    """Returns the model's turns in dialogues: each question sees what came before.

    Args:
        questions: the user's turns of each dialogue, as many in all.
        options: of `generation.generate`.
    """
    from helpers.inference.generation import generate

    dialogues: list[Messages] = [[] for _ in questions]
    for turn in range(len(questions[0])):
        for dialogue, asked in zip(dialogues, questions, strict=True):
            dialogue.append({"role": "user", "content": asked[turn]})
        given = generate(model, tokenizer, [*dialogues], **options)
        for dialogue, reply in zip(dialogues, given, strict=True):
            dialogue.append({"role": "assistant", "content": reply.text})
    return [[m["content"] for m in dialogue[1::2]] for dialogue in dialogues]


def rate(
    client: Judge, folder: Path, questions: list[Row], answers: dict[int, Row]
) -> list[Row]:
    """Returns one judgment a question and turn, in FastChat's format.

    `score` is None where the judge gave no rating; `judgment` then says why.

    Args:
        client: the judge.
        folder: from `find_data`.
        questions: that were answered.
        answers: from `answer`.

    Raises:
        DataError: a question of maths, reasoning or coding has no reference answer.
        JudgeError: see `Judge.ask`.
    """
    prompts, references = read_prompts(folder), read_references(folder)
    rows, asked = [], []
    for question in questions:
        number, category = question["question_id"], question["category"]
        kind = "math-" if category in WITH_REFERENCE else ""
        if kind and number not in references:
            raise DataError(f"question {number} ({category}) has no reference answer")
        said = answers[number]["choices"][0]["turns"]
        fields = {"question": question["turns"][0], "answer": said[0]}
        texts = {"question": question["turns"], "answer": said}
        texts["ref_answer"] = references.get(number, [])
        for name, turns in texts.items():
            fields |= {f"{name}_{n}": text for n, text in enumerate(turns, start=1)}
        for turn, ending in ((1, ""), (2, "-multi-turn")):
            name = f"single-{kind}v1{ending}"
            asked.append(judge.fill(prompts[name], **fields))
            rows.append(
                {
                    "question_id": number,
                    "category": category,
                    "model": answers[number]["model_id"],
                    "judge": [client.model, name],
                    "user_prompt": asked[-1][1]["content"],
                    "turn": turn,
                }
            )
    for row, reply in zip(rows, client.ask(asked), strict=True):
        row["judgment"] = reply.text or f"no answer: {reply.error}"
        row["score"] = judge.read_rating(reply.text)
        row["tstamp"] = time.time()
    return rows


def measure(
    run: Run,
    adapters: dict[str, Path | str | None],
    client: Judge | None,
    *,
    folder: Path | None = None,
    limit: int | None = None,
    max_new_tokens: int = 1024,
) -> dict[str, dict[str, Any]]:
    """Returns the scores of models by their labels, nothing without a judge.

    Answers lie in `eval/<label>/mt_bench.jsonl`, judgments in `mt_bench_judged.jsonl`
    beside it, scores in the report, and the picture in `eval/mt_bench.png`.

    Args:
        run: whose models answer.
        adapters: the adapter of each label, from `train.adapters`.
        client: the judge; None stops after the answers.
        folder: see `fastchat.find_data`.
        limit: only so many questions, spread evenly over the file.
        max_new_tokens: a turn is cut here.

    Raises:
        DataError: FastChat's files are missing or not as they should be.
        JudgeError: see `Judge.ask`, or no rating at all could be read.
    """
    folder = find_data(folder)
    questions = judge.spread(read_questions(folder), limit)
    parts = {}
    for label, adapter in adapters.items():
        answers = answer(run, label, adapter, questions, max_new_tokens=max_new_tokens)
        if client is None:
            continue
        rows = rate(client, folder, questions, answers)
        path = run.path / "eval" / label / "mt_bench_judged.jsonl"
        data.write_rows(path, rows)
        if all(row["score"] is None for row in rows):
            raise judge.unreadable("rating", [row["judgment"] for row in rows], path)
        parts[label] = {**summarise(rows), "judge": client.model}
        judge.add_result(run, label, "mt_bench", parts[label])
    if parts:
        draw_radar(parts, run.path / "eval" / "mt_bench.png")
    return parts


def main(arguments: list[str]) -> None:
    """Answers MT-Bench with models of a run and has a judge rate the answers.

    Raises:
        SystemExit: something that the user can mend is wrong; the message says what.
    """
    parser = judge.answering_parser("python -m helpers mt-bench", "questions", 1024)
    parser.add_argument("--data", type=Path, help="FastChat's llm_judge/data folder")
    given = parser.parse_args(arguments)
    with runtime.exit_on(ValueError, OSError):
        parts = measure(**judge.open_answering(given), folder=given.data)
    print(show_scores(parts) if parts else judge.UNJUDGED)  # noqa: T201
