"""Rows in any known format -> `messages`; refuses bad rows by number and reason.

A conversation is a list of `{"role": ..., "content": ...}`, the form that chat
templates take. Nothing here tokenises.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from helpers import runtime
from helpers.runs import Run, fingerprint, write_text

Messages = list[dict[str, str]]
Row = dict[str, Any]

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"}
ROLES |= {"system": "system"}


class DataError(ValueError):
    """Rows that cannot be used; the message gives row numbers and reasons."""


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


def from_messages(row: Row) -> Messages:
    return [{"role": m["role"], "content": m["content"]} for m in row["messages"]]


def from_sharegpt(row: Row) -> Messages:
    turns = row["conversations"]
    return [
        {"role": ROLES.get(turn["from"], turn["from"]), "content": turn["value"]}
        for turn in turns
    ]


def from_problem(row: Row) -> Messages:
    return [
        {"role": "user", "content": row["question"]},
        {"role": "assistant", "content": row["answer"]},
    ]


def from_instruction(row: Row) -> Messages:
    extra = row.get("input") or row.get("context") or ""
    answer = row["output"] if "output" in row else row["response"]
    question = f"{row['instruction']}\n\n{extra}" if extra else row["instruction"]
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]


def from_completion(row: Row) -> Messages:
    return [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["completion"]},
    ]


def from_llama2_text(row: Row) -> Messages:
    """Returns the turns of ready-made `<s>[INST] ... [/INST] ... </s>` text."""
    messages: Messages = []
    for turn in re.split(r"\s*</s>\s*", row["text"].strip()):
        if not turn:
            continue
        parts = re.fullmatch(
            r"(?:<s>)?\s*\[INST\]\s*(?:<<SYS>>\s*(.*?)\s*<</SYS>>)?\s*(.*?)\s*"
            r"\[/INST\]\s*(.*)",
            turn,
            re.DOTALL,
        )
        if parts is None:
            raise KeyError("text is not `<s>[INST] ... [/INST] ... </s>`")
        system, question, answer = parts.groups()
        if system:
            messages.append({"role": "system", "content": system})
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return messages


# name, the columns it needs, how a row becomes messages; the first that fits is taken
FORMATS: list[tuple[str, set[str], Callable[[Row], Messages]]] = [
    ("openai messages", {"messages"}, from_messages),
    ("sharegpt", {"conversations"}, from_sharegpt),
    ("gsm8k", {"question", "answer"}, from_problem),
    ("alpaca", {"instruction", "output"}, from_instruction),
    ("dolly", {"instruction", "response"}, from_instruction),
    ("prompt/completion", {"prompt", "completion"}, from_completion),
    ("llama-2 text", {"text"}, from_llama2_text),
]


def detect_format(rows: list[Row]) -> tuple[str, str]:
    """Returns the name of the rows' format and the reason for it.

    >>> detect_format([{"instruction": "Add.", "input": "1 2", "output": "3"}])
    ('alpaca', 'the rows have instruction, output')

    Raises:
        DataError: the columns fit no known format.
    """
    columns = set(rows[0])
    for name, needed, _ in FORMATS:
        if needed <= columns:
            return name, f"the rows have {', '.join(sorted(needed))}"
    known = "; ".join(f"{name}: {', '.join(sorted(n))}" for name, n, _ in FORMATS)
    raise DataError(
        f"the rows have {', '.join(sorted(columns))}, which fits no known format "
        f"({known}); rename columns to one of these"
    )


def check_messages(messages: Messages) -> str | None:
    """Returns what is wrong with a conversation, None when nothing is.

    >>> check_messages([{"role": "user", "content": "Hi"}])
    'no assistant turn'
    """
    for message in messages:
        if not isinstance(message["content"], str):
            return f"the content of a {message['role']} turn is not text"
        if message["role"] not in ROLES.values():
            return f"role {message['role']!r} is not system, user or assistant"
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if "assistant" not in turns:
        return "no assistant turn"
    if turns != [("user", "assistant")[i % 2] for i in range(len(turns))]:
        return f"turns do not alternate from user to assistant: {' '.join(roles)}"
    if any(not m["content"].strip() for m in messages if m["role"] == "assistant"):
        return "empty answer"
    return None


def to_conversations(
    rows: list[Row],
    system_prompt: str = "",
    source: str = "the rows",
    *,
    drop_unusable: bool = False,
) -> tuple[list[Messages], dict[str, int]]:
    """Returns the rows as conversations, and how many were left out, by reason.

    Args:
        rows: rows of one format; see `FORMATS`.
        system_prompt: put before problems (GSM8K format), so that training and
            evaluation ask in the same words.
        source: where the rows come from, for messages.
        drop_unusable: leave unusable rows out and count them, instead of refusing all.

    Raises:
        DataError: a row lacks an expected field or breaks the turn order (its number,
            counted from 1, and the reason are given), or no row is left.
    """
    name, _ = detect_format(rows)
    convert = next(function for known, _, function in FORMATS if known == name)
    kept: list[Messages] = []
    seen: set[str] = set()
    left_out = {"empty answer": 0, "duplicate": 0}
    faults: list[str] = []
    for number, row in enumerate(rows, start=1):
        try:
            messages = convert(row)
            fault = check_messages(messages)
        except (KeyError, TypeError, AttributeError) as error:
            fault = f"unreadable as {name}: {type(error).__name__} {error}"
        if fault == "empty answer":
            left_out[fault] += 1
        elif fault:
            faults.append(f"row {number}: {fault}")
        elif (key := fingerprint(messages)) in seen:
            left_out["duplicate"] += 1
        else:
            seen.add(key)
            if name == "gsm8k" and system_prompt:
                messages.insert(0, {"role": "system", "content": system_prompt})
            kept.append(messages)
    if faults and not drop_unusable:
        raise DataError(
            f"{source}: {len(faults)} of {len(rows)} rows cannot be used as {name}; "
            + "; ".join(faults[:3])
            + " (data.drop_unusable in the config leaves such rows out)"
        )
    if faults:
        left_out[f"unusable ({faults[0]})"] = len(faults)
    if not kept:
        raise DataError(f"{source}: no row is left ({left_out})")
    return kept, {reason: count for reason, count in left_out.items() if count}


def to_problems(rows: list[Row], source: str = "the rows") -> list[Row]:
    """Returns problems as `{"id", "question", "answer", "gold"}`.

    Args:
        rows: GSM8K-format rows; `answer` ends in a line `#### <number>`.

    Raises:
        DataError: a row has no question, or no gold answer after `####`.
    """
    from helpers.rewards import parse_gold

    problems, faults = [], []
    for number, row in enumerate(rows, start=1):
        question, answer = row.get("question"), row.get("answer")
        if not question or not answer:
            faults.append(f"row {number}: question or answer is missing")
            continue
        if not isinstance(question, str) or not isinstance(answer, str):
            faults.append(f"row {number}: question or answer is not text")
            continue
        gold = parse_gold(answer)
        if gold is None:
            faults.append(f"row {number}: answer has no `#### <number>` line")
            continue
        key = str(row.get("id") or fingerprint(question))
        problems.append(
            {"id": key, "question": question, "answer": answer, "gold": str(gold)}
        )
    if faults:
        raise DataError(
            f"{source}: {len(faults)} of {len(rows)} rows are no problems with a gold "
            "answer; " + "; ".join(faults[:3])
        )
    return problems


def ask(question: str, system_prompt: str) -> Messages:
    """Returns the prompt for a problem: the same in training, GRPO and evaluation."""
    messages = [{"role": "user", "content": question}]
    if system_prompt:
        messages.insert(0, {"role": "system", "content": system_prompt})
    return messages


def questions_of(messages: Messages) -> list[str]:
    """Returns the user turns, by which leaks are found."""
    return [m["content"] for m in messages if m["role"] == "user"]


def assert_disjoint(train: Iterable[str], held_out: dict[str, Iterable[str]]) -> None:
    """Raises DataError when a held-out question is among those trained on.

    Args:
        train: the questions of the training rows.
        held_out: the questions of each held-out set, by the set's name.
    """
    known = {" ".join(question.split()) for question in train}
    for name, questions in held_out.items():
        leaked = [q for q in questions if " ".join(q.split()) in known]
        if leaked:
            raise DataError(
                f"{len(leaked)} questions of {name} are in the training rows too, "
                f"the first: {leaked[0][:80]!r}; remove them from one side"
            )


def prepare(run: Run) -> dict[str, Any]:
    """Writes the run's `data/` and returns its part of the report.

    Writes `train.jsonl` and `eval.jsonl` (`id`, `messages`), `problems.jsonl`,
    `test.jsonl` and `test_new.jsonl` (`id`, `question`, `answer`, `gold`).
    Where a count is capped, training rows are drawn by the run's seed; of the other
    sets the first ones are taken.

    Raises:
        DataError: rows are unusable, or a held-out question would be trained on.
    """
    import random

    config = run.config.data
    system = run.config.system_prompt
    conversations: list[Messages] = []
    sources, left_out = {}, {}
    for source in config.train:
        rows = load_rows(source, config.train_rows, run.config.seed)
        found, dropped = to_conversations(
            rows, system, source, drop_unusable=config.drop_unusable
        )
        conversations += found
        sources[source] = {"format": detect_format(rows)[0], "rows": len(found)}
        left_out[source] = dropped
    random.Random(run.config.seed).shuffle(conversations)

    problem_rows = load_rows(config.problems)
    evaluation_rows = load_rows(config.eval)
    if config.eval == config.problems:
        # one source for both: the last rows are kept for the eval loss alone
        cut = len(problem_rows) - (config.eval_rows or max(1, len(problem_rows) // 10))
        if cut < 1:
            raise DataError(
                f"{config.problems} has {len(problem_rows)} rows and serves as "
                f"problems and as eval; eval_rows={config.eval_rows} leaves no problem"
            )
        problem_rows, evaluation_rows = problem_rows[:cut], evaluation_rows[cut:]
    evaluation, _ = to_conversations(
        evaluation_rows[: config.eval_rows], system, config.eval
    )
    parts: dict[str, list[Row]] = {
        "train": with_ids(conversations),
        "eval": with_ids(evaluation),
        "problems": to_problems(problem_rows, config.problems),
        "test": to_problems(load_rows(config.test, config.test_rows), config.test),
        "test_new": to_problems(
            load_rows(config.test_new, config.test_new_rows), config.test_new
        ),
    }
    trained = [q for row in parts["train"] for q in questions_of(row["messages"])]
    trained += [row["question"] for row in parts["problems"]]
    assert_disjoint(
        trained,
        {
            "eval": [questions_of(row["messages"])[0] for row in parts["eval"]],
            "test": [row["question"] for row in parts["test"]],
            "test_new": [row["question"] for row in parts["test_new"]],
        },
    )
    for name, rows in parts.items():
        write_rows(run.path / "data" / f"{name}.jsonl", rows)
    report: dict[str, Any] = {name: len(rows) for name, rows in parts.items()}
    report |= {"sources": sources, "left_out": left_out}
    report["fingerprints"] = {name: fingerprint(rows) for name, rows in parts.items()}
    run.write_part("data", report)
    return report


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
    if not (folder / "test_new.jsonl").exists():
        print(f"{folder} is missing (notebook 01_data_prep makes it): preparing it now")  # noqa: T201
        prepare(run)
    return folder
