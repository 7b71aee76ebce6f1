"""Loads rows, mixes and splits them into the `data/` of a run, and finds leaks.

What a row means is in `formats`. Nothing here tokenises.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from helpers import runtime
from helpers.config import DataConfig
from helpers.formats import (
    DataError,
    Messages,
    Row,
    detect_format,
    to_conversations,
    to_problems,
)
from helpers.runs import Run, fingerprint, write_text

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
# the files of a run's `data/`
PARTS = ["train", "eval", "test_chat", "problems", "test", "test_new"]


def load_rows(
    source: str, limit: int | None = None, seed: int | None = None
) -> list[Row]:
    """Returns the rows of a local file or a hub dataset.

    Args:
        source: a path to .jsonl, .json, .csv or .parquet (from the working folder or
            the project's), or a hub name `owner/name[/config][:split]`.
        limit: at most this many rows.
        seed: draw them at random with it; without it the first ones are taken.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: the file or the hub dataset could not be read, or is empty.
    """
    import datasets

    datasets.disable_progress_bars()
    suffix = Path(source).suffix.lower()
    if suffix in READERS:
        places = [Path(source), runtime.ROOT / source]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise FileNotFoundError(
                f"no file {source} (looked in {Path.cwd()} and {runtime.ROOT}); "
                "give a path to a .jsonl, .json, .csv or .parquet file"
            )
        arguments: dict[str, Any] = {"path": READERS[suffix], "split": "train"}
        arguments |= {"data_files": str(path)}
    else:
        matched = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?::(\w+))?", source)
        if matched is None:
            raise DataError(
                f"{source!r} is neither a .jsonl, .json, .csv or .parquet file nor a "
                "hub name like owner/name, owner/name/config or owner/name:split"
            )
        name, config, split = matched.groups()
        arguments = {"path": name, "name": config, "split": split or "train"}
    try:
        rows = datasets.load_dataset(**arguments)
    except Exception as error:  # datasets raises many kinds; all mean "not readable"
        cause = error.__cause__ or error
        kind = type(cause).__name__
        nothing = kind in ("StopIteration", "EmptyDataError")
        if suffix in READERS and (nothing or "no data!" in str(cause)):
            raise DataError(f"{source} holds no rows") from error
        raise DataError(
            f"{source} could not be read: {kind}: {str(cause)[:300]}"
            + ("" if suffix in READERS else " (is the hub reachable from here?)")
        ) from error
    if len(rows) == 0:
        raise DataError(f"{source} holds no rows")
    if seed is not None and limit is not None and limit < len(rows):
        rows = rows.shuffle(seed=seed)
    return list(rows.select(range(min(limit or len(rows), len(rows)))))


def ask(question: str, system_prompt: str) -> Messages:
    """Returns the prompt for a problem: the same in training, GRPO and evaluation."""
    messages = [{"role": "user", "content": question}]
    if system_prompt:
        messages.insert(0, {"role": "system", "content": system_prompt})
    return messages


def questions_of(messages: Messages) -> list[str]:
    """Returns the user turns, by which leaks are found."""
    return [m["content"] for m in messages if m["role"] == "user"]


def first_question(messages: Messages) -> Messages:
    """Returns a conversation up to its first user turn, a prompt to answer."""
    number = [m["role"] for m in messages].index("user")
    return messages[: number + 1]


def normal(question: str) -> str:
    """Returns a question as it is compared: white space does not count."""
    return " ".join(question.split())


def assert_disjoint(train: Iterable[str], held_out: dict[str, Iterable[str]]) -> None:
    """Raises DataError when a held-out question is among those trained on.

    Args:
        train: the questions of the training rows.
        held_out: the questions of each held-out set, by the set's name.
    """
    known = {normal(question) for question in train}
    for name, questions in held_out.items():
        leaked = [q for q in questions if normal(q) in known]
        if leaked:
            raise DataError(
                f"{len(leaked)} questions of {name} are in the training rows too, "
                f"the first: {leaked[0][:80]!r}; remove them from one side"
            )


def split(
    conversations: list[Messages], shares: dict[str, float]
) -> dict[str, list[Messages]]:
    """Returns the conversations in parts: `train`, and each name of `shares`.

    The hash of the first question decides, so that a conversation stays on its side
    when data are added, and all that ask the same go to the same side. Of few
    conversations a part may get none that way: it takes those of the smallest hash.

    Args:
        conversations: from `to_conversations`.
        shares: the part of the whole that each name gets, 0 to 1.

    Raises:
        DataError: nothing is left to train on.
    """
    groups: dict[float, list[Messages]] = {}
    for messages in conversations:
        digest = hashlib.sha256(normal(questions_of(messages)[0]).encode()).hexdigest()
        groups.setdefault(int(digest[:12], 16) / 16**12, []).append(messages)
    side: dict[float, str] = {}
    low = 0.0
    for name, share in shares.items():
        side |= {place: name for place in groups if low <= place < low + share}
        low += share
    for name in shares:
        free = [place for place in sorted(groups) if place not in side]
        if name not in side.values() and free:
            side[free[0]] = name
    parts: dict[str, list[Messages]] = {name: [] for name in ["train", *shares]}
    for place, group in groups.items():
        parts[side.get(place, "train")] += group
    if not parts["train"]:
        raise DataError(
            f"{len(groups)} different questions, of which {' and '.join(shares)} take "
            f"{sum(shares.values()):.0%}: none is left to train on; give more rows"
        )
    return parts


def parts_of(config: DataConfig) -> list[str]:
    """Returns which of `PARTS` a run with this config has."""
    given = {
        "train": config.train,
        "eval": config.eval or (config.train and config.eval_share),
        "test_chat": config.train and config.test_share,
        "problems": config.problems,
        "test": config.test,
        "test_new": config.test_new,
    }
    return [name for name in PARTS if given[name]]


def prepare(run: Run) -> dict[str, Any]:
    """Writes the run's `data/` and returns its part of the report.

    Writes what the config has of `train.jsonl`, `eval.jsonl` and `test_chat.jsonl`
    (`id`, `messages`), `problems.jsonl`, `test.jsonl` and `test_new.jsonl` (`id`,
    `question`, `answer`, `gold`). Where a count is capped, training rows are drawn by
    the run's seed; of the other sets the first ones are taken.

    Raises:
        DataError: rows are unusable, or a held-out question would be trained on.
    """
    config, system = run.config.data, run.config.system_prompt
    parts: dict[str, list[Row]] = {}
    report: dict[str, Any] = {}
    if config.train:
        chats, report = mix(run)
        limits = {"test_chat": config.test_rows, "eval": config.eval_rows}
        shares = {"test_chat": config.test_share, "eval": config.eval_share}
        found = split(chats, {name: share for name, share in shares.items() if share})
        for name, chosen in found.items():
            parts[name] = with_ids(chosen[: limits.get(name)])
    problem_rows = load_rows(config.problems) if config.problems else []
    if config.eval:
        rows = load_rows(config.eval)
        if config.eval == config.problems:
            problem_rows, rows = share_problems(config, rows)
        evaluation, _ = to_conversations(rows[: config.eval_rows], system, config.eval)
        parts["eval"] = with_ids(evaluation)
    if config.problems:
        parts["problems"] = to_problems(problem_rows, config.problems)
    if config.test:
        rows = load_rows(config.test, config.test_rows)
        parts["test"] = to_problems(rows, config.test)
    if config.test_new:
        rows = load_rows(config.test_new, config.test_new_rows)
        parts["test_new"] = to_problems(rows, config.test_new)

    trained = [
        q for row in parts.get("train", []) for q in questions_of(row["messages"])
    ]
    trained += [row["question"] for row in parts.get("problems", [])]
    held_out: dict[str, Iterable[str]] = {
        name: [row["question"] for row in parts.get(name, [])]
        for name in ("test", "test_new")
    }
    if config.eval:
        held_out["eval"] = [questions_of(row["messages"])[0] for row in parts["eval"]]
    assert_disjoint(trained, held_out)
    for name in PARTS:
        path = run.path / "data" / f"{name}.jsonl"
        path.unlink(missing_ok=True)
        if name in parts:
            write_rows(path, parts[name])
    report = {name: len(parts[name]) for name in PARTS if name in parts} | report
    report["fingerprints"] = {name: fingerprint(rows) for name, rows in parts.items()}
    run.write_part("data", report)
    return report


def mix(run: Run) -> tuple[list[Messages], dict[str, Any]]:
    """Returns the conversations of all train sources, shuffled, and what they are."""
    import random

    config = run.config.data
    conversations: list[Messages] = []
    sources, left_out = {}, {}
    for source in config.train:
        rows = load_rows(source, config.train_rows, run.config.seed)
        found, dropped = to_conversations(
            rows,
            run.config.system_prompt,
            source,
            drop_unusable=config.drop_unusable,
        )
        conversations += found
        sources[source] = {"format": detect_format(rows)[0], "rows": len(found)}
        left_out[source] = dropped
    random.Random(run.config.seed).shuffle(conversations)
    return conversations, {"sources": sources, "left_out": left_out}


def share_problems(config: DataConfig, rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Returns one source's rows as problems and, the last ones, for the eval loss."""
    cut = len(rows) - (config.eval_rows or max(1, len(rows) // 10))
    if cut < 1:
        raise DataError(
            f"{config.problems} has {len(rows)} rows and serves as problems and as "
            f"eval; eval_rows={config.eval_rows} leaves no problem"
        )
    return rows[:cut], rows[cut:]


def with_ids(conversations: list[Messages]) -> list[Row]:
    """Returns `{"id", "messages"}` rows, the id being a hash of the content."""
    return [{"id": fingerprint(m), "messages": m} for m in conversations]


def write_rows(path: Path, rows: list[Row]) -> None:
    """Writes rows as JSON lines."""
    import json

    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_text(path, "".join(lines))


def read_rows(path: Path) -> list[Row]:
    """Returns the rows of a JSON-lines file of ours."""
    import json

    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def ensure_data(run: Run) -> Path:
    """Returns the run's `data/`, preparing it first, with a word, if it is missing."""
    folder = run.path / "data"
    parts = parts_of(run.config.data)
    if not all((folder / f"{name}.jsonl").exists() for name in parts):
        print(f"{folder} is missing (notebook 01_data_prep makes it): preparing it now")  # noqa: T201
        prepare(run)
    return folder
