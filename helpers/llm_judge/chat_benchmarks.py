"""MT-Bench, in files of FastChat's formats, and AlpacaEval 2, by its own package."""

import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import hf_hub_download
from transformers import set_seed

from helpers import runtime
from helpers.data.formats import Messages, Row, ask
from helpers.errors import DataError, JudgeError, ModelError
from helpers.evaluation import metrics
from helpers.files import fingerprint, write_json, write_rows
from helpers.inference.chat import break_control
from helpers.inference.generation import generate_batches
from helpers.inference.items import answer_rows, find_adapters, model_print
from helpers.llm_judge import judge as judges
from helpers.models import load as models
from helpers.runs import Run, writes

# `temperature_config` and `NEED_REF_CATS` of fastchat/llm_judge/common.py
TEMPERATURES = defaultdict(lambda: 0.7, {"stem": 0.1, "humanities": 0.1})
TEMPERATURES |= dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0)
WITH_REFERENCE = ("math", "reasoning", "coding")
# the answers that AlpacaEval 2 compares with; they hold its 805 instructions
BASELINE = ("tatsu-lab/alpaca_eval", "alpaca_eval_gpt4_baseline.json")
# of the package, which works with no newer versions
OF_ALPACA_EVAL = ["alpaca_eval==0.6.6", "datasets<4", "openai<2", "pandas<3"]
OF_ALPACA_EVAL += ["scikit-learn<1.8", "setuptools<81"]
Answering = Callable[[Path, list[Messages], Row], list[str]]


def spread(rows: list[Row], limit: int | None) -> list[Row]:
    return rows[:: -(-len(rows) // limit) if limit else 1]


def load_answering(run: Run, adapter: Path | str | None, max_length: int) -> Answering:
    """Returns a function that answers prompts; answers in its file are kept."""
    config, options = run.config, models.options(run.config)
    options["max_length"] = max(config.max_length, max_length)
    loaded = models.load_model(config.model, adapter=adapter, **options)
    batches: Row = {"batch_size": config.evaluation.batch_size}

    def answer(path: Path, prompts: list[Messages], sampling: Row) -> list[str]:
        set_seed(config.seed)
        drawn = [config.seed] if sampling.get("temperature") else []
        settings = fingerprint(model_print(config, adapter), sampling, *drawn)
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


def mean_scores(rows: list[Row]) -> dict[str, Any]:
    """Returns mean scores; the interval is over questions, whose turns depend."""

    def means(part: pd.DataFrame) -> dict[str, float | None]:
        scores = part.groupby("turn")["score"].mean().add_prefix("turn_")
        scores["score"] = part["score"].mean()
        return {name: round(x, 3) if x == x else None for name, x in scores.items()}

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
) -> pd.DataFrame | str:
    """Returns the mean ratings of models, or a message where no judge is configured.

    Args:
        run: whose models answer.
        judge: from `open_judge`; None stops after the answers.
        labels: of models, by default `base` and all stages.
        limit: of questions, spread evenly over the file.
        max_new_tokens: of a turn; 1,024 is FastChat's.

    Raises:
        DataError: the run has no such model, or FastChat's data is not installed.
        JudgeError: see `Judge.ask`, or no rating at all could be read.
    """
    fastchat, columns = judges.read_fastchat(), {}
    questions = spread(fastchat[0], limit)
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
        part = {**mean_scores(rows), "judge": judge.model}
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


def annotate(
    outputs: Path, reference: Path, judge: judges.Judge, evaluator: str | None = None
) -> dict[str, Any]:
    """Returns the win rate over the reference by the package `alpaca_eval`."""
    runtime.hub_reachable()  # sets HF_HUB_OFFLINE
    client = {"timeout": judge.timeout_s, "max_retries": judge.retries}
    environment = {
        "OPENAI_API_KEY": judge.api_key,
        "OPENAI_CLIENT_CONFIG_PATH": "",  # could name another judge
        "OPENAI_MAX_CONCURRENCY": str(judge.workers),
        "TQDM_DISABLE": "1",  # its bars end after the error
    }
    settings = [str(outputs), str(reference), judge.model, judge.base_url, evaluator]
    packages: Any = {"requirements": OF_ALPACA_EVAL, "environment": environment}
    try:
        return runtime.run_alone(measure_wins, *settings, client, **packages)
    except ModelError as error:
        remedy = "--evaluator alpaca_eval_gpt4 without log-probabilities"
        text = f"alpaca_eval stopped: {error}; it needs `pip install uv`, and {remedy}"
        raise JudgeError(text) from None


@writes
def run_alpaca_eval(
    run: Run,
    judge: judges.Judge | None,
    *,
    labels: list[str] | None = None,
    limit: int | None = None,
    max_new_tokens: int = 2048,
    reference: Path | None = None,
    evaluator: str | None = None,
) -> pd.DataFrame | str:
    """Returns the win rates of models, or a message where no judge is configured.

    Args:
        run, judge, labels, limit, max_new_tokens: as for `run_mt_bench`.
        reference: outputs to win against, by default AlpacaEval 2's baseline.
        evaluator: a configuration of the package, by default AlpacaEval 2's, which
            needs a judge with log-probabilities (`alpaca_eval_gpt4` does not).

    Raises:
        DataError, OSError: the run has no such model, or there is no reference.
        JudgeError: the package is missing, stopped, or read no verdict.
    """
    if reference is None:
        runtime.hub_reachable()  # else it would retry for minutes
        reference = Path(hf_hub_download(*BASELINE, repo_type="dataset"))
    rows = judges.read_columns(reference, "instruction", "output")
    if not all(isinstance(text, str) for row in rows for text in row.values()):
        raise DataError(f"{reference}: not every instruction and output is a text")
    texts = [row["instruction"] for row in spread(rows, limit)]
    name = "alpaca_eval" if len(texts) == 805 else f"alpaca_eval_{len(texts)}"
    sampling = {**run.config.inference, "max_new_tokens": max_new_tokens}
    parts = {}
    for label, adapter in find_adapters(run, labels).items():
        path = run.path / "eval" / label / name / "model_outputs.json"
        answer = load_answering(run, adapter, 2 * max_new_tokens)
        prompts = [ask(text, "") for text in texts]
        answers = answer(path.with_name("answers.jsonl"), prompts, sampling)
        del answer  # and its model
        runtime.free_memory()
        turns = break_control([{"content": answer} for answer in answers])
        plain = [turn["content"] for turn in turns]  # put into the judge's prompts
        outputs = pd.DataFrame({"instruction": texts, "output": plain})
        outputs["generator"] = f"{run.config.name}-{label}"
        write_json(path, outputs.to_dict("records"))
        if judge is not None:
            parts[label] = annotate(path, reference, judge, evaluator)
            parts[label]["judge"] = judge.model
            judges.add_result(run, label, name, parts[label])
    return pd.DataFrame(parts) if parts else judges.UNJUDGED


def measure_wins(
    outputs: str, reference: str, model: str, url: str, evaluator: str, client: Any
) -> dict[str, Any]:
    """Returns the win rate, length-controlled too where the package can do that."""
    from pathlib import Path

    import pandas as pd
    import yaml
    from alpaca_eval.annotators import PairwiseAnnotator
    from alpaca_eval.constants import ANNOTATOR_CONFIG_AE2, EVALUATORS_CONFIG_DIR
    from alpaca_eval.metrics import get_length_controlled_winrate, get_winrate

    # its configuration of the evaluator, with the judge replaced
    name, theirs = evaluator or ANNOTATOR_CONFIG_AE2, EVALUATORS_CONFIG_DIR
    path = Path(outputs).with_name(name) / "configs.yaml"
    (config,) = yaml.safe_load((theirs / name / path.name).read_text()).values()
    if config.get("fn_completion_parser") not in ("logprob_parser", "ranking_parser"):
        raise SystemExit(f"{name} may read a verdict in a judge's thoughts")
    config["prompt_template"] = str(theirs / config["prompt_template"])
    options = config["completions_kwargs"]
    # the form of prompts is else guessed from the model's name
    options |= {"model_name": model, "client_kwargs": client, "requires_chatml": True}
    options["openai_api_base"] = url or "https://api.openai.com/v1"
    path.parent.mkdir(parents=True, exist_ok=True)
    # the package keeps annotations by this name: another judge, other annotations
    path.write_text(yaml.safe_dump({f"{name} by {model} at {url}": config}))
    ours, peers = pd.read_json(outputs), pd.read_json(reference)
    rows = PairwiseAnnotator(annotators_config=path).annotate_head2head(peers, ours)
    if all(pd.isna(row["preference"]) for row in rows):
        raise SystemExit(f"no readable verdict in any of {len(rows)} judgments")
    result = get_winrate(rows)
    result["avg_length"] = int(ours["output"].str.len().mean())
    result["missing"] = len(ours) - int(result["n_total"])
    if len(ours) < 805:
        return result | {"not_length_controlled": "needs all of the 805 instructions"}
    try:
        return result | get_length_controlled_winrate(rows, save_weights_dir=None)
    except Exception as error:  # whatever the hub, the fit or a missing row raise
        return result | {"not_length_controlled": repr(error)[:200]}
