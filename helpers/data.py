"""Mixes rows and splits them into the `data/` of a run, without holding them all.

What a row means is in `formats`, where it comes from in `sources`, which are left out
in `reading`. Nothing here tokenises.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

from helpers.config import DataConfig
from helpers.formats import DataError, Messages, Row
from helpers.reading import Reader, to_conversations, to_problems
from helpers.runs import Run, fingerprint
from helpers.sources import load_rows, open_rows, parse_source
from helpers.splits import assert_disjoint, normal, place_of, split
from helpers.spool import Spool, questions_of

# the files of a run's `data/`
PARTS = ["train", "eval", "test_chat", "problems", "test", "test_new"]


def ask(question: str, system_prompt: str, shots: Messages | None = None) -> Messages:
    """Returns the prompt for a problem: the same in training, GRPO and evaluation.

    Args:
        question: the problem.
        system_prompt: the first turn, none if empty.
        shots: turns between the two, from `prompts.shots`.
    """
    messages = [*(shots or []), {"role": "user", "content": question}]
    if system_prompt:
        messages.insert(0, {"role": "system", "content": system_prompt})
    return messages


def first_question(messages: Messages) -> Messages:
    """Returns a conversation up to its first user turn, a prompt to answer."""
    number = [m["role"] for m in messages].index("user")
    return messages[: number + 1]


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


def answered(parts: Iterable[str]) -> list[str]:
    """Returns the held-out parts that models answer: problems, test conversations.

    Those of `eval` only where there is nothing else; otherwise they give a loss alone.
    """
    known = set(parts)
    order = ["test", "test_new", "test_chat"]
    return [name for name in order if name in known] or sorted(known & {"eval"})


def prepare(run: Run) -> dict[str, Any]:
    """Writes the run's `data/` and returns its part of the report.

    Writes what the config has of `train.jsonl`, `eval.jsonl` and `test_chat.jsonl`
    (`id`, `messages`), `problems.jsonl`, `test.jsonl` and `test_new.jsonl` (`id`,
    `question`, `answer`, `gold`). Where a count is capped, training rows are drawn by
    the run's seed; of the other sets the first ones are taken. Conversations go
    through a file of their own, so that memory does not grow with their length.

    Raises:
        DataError: rows are unusable, or a held-out question would be trained on.
    """
    config = run.config.data
    with tempfile.TemporaryFile() as file:
        spool = Spool(file)
        groups: dict[str, array[int]] = {}
        report: dict[str, Any] = {}
        if config.train:
            chosen, report = mix(run, spool)
            groups, again = divide(config, spool, chosen)
            if again.left_out:
                report["left_out"]["the mix"] = again.left_out
        sets = held_in_memory(run)
        trained = chain(
            (q for at in groups.get("train", ()) for q in questions_of(spool[at])),
            (row["question"] for row in sets.get("problems", [])),
        )
        tests: dict[str, Iterable[str]] = {
            name: [row["question"] for row in sets.get(name, [])]
            for name in ("test", "test_new")
        }
        evaluated = [questions_of(row["messages"])[0] for row in sets.get("eval", [])]
        assert_disjoint(trained, tests | {"eval": evaluated})
        counts, prints = {}, {}
        paths = {name: run.path / "data" / f"{name}.jsonl" for name in PARTS}
        for path in paths.values():  # first all, so that a kill leaves no old part
            path.unlink(missing_ok=True)
        for name, path in paths.items():
            if name in groups:
                rows = with_ids(spool[at] for at in groups[name])
                counts[name], prints[name] = write_rows(path, rows)
            elif name in sets:
                counts[name], prints[name] = write_rows(path, sets[name])
    report = counts | report | {"fingerprints": prints, "made_from": made_from(run)}
    run.write_part("data", report)
    return report


def mix(run: Run, spool: Spool) -> tuple[array[int], dict[str, Any]]:
    """Fills the spool from all train sources; returns which to use, and a report.

    The numbers on the spool are shuffled by the run's seed, all of them, as a full
    shuffle of numbers costs little memory; a buffer would leave the sources apart.
    """
    config, seen = run.config.data, set[int]()
    readers, counts = {}, []
    for source in config.train:
        reader = Reader(
            source,
            parse_source(source).format,
            run.config.system_prompt,
            config.max_chars,
            config.drop_unusable,
            seen,
        )
        rows = open_rows(source, config.train_rows, run.config.seed)
        for messages in reader.read(rows):
            spool.append(messages)
        readers[source] = reader
        counts.append(reader.kept)
    weights = [parse_source(source).weight for source in config.train]
    quotas, taken = by_weight(counts, weights), [0] * len(counts)
    ends, chosen = list(accumulate(counts)), array("Q")
    order = array("Q", range(sum(counts)))
    random.Random(run.config.seed).shuffle(order)
    for number in order:
        of = bisect_right(ends, number)
        if taken[of] < quotas[of]:
            taken[of] += 1
            chosen.append(number)
    sources = {
        source: {"format": r.form, "why": r.why, "read": r.rows, "rows": rows}
        for (source, r), rows in zip(readers.items(), taken, strict=True)
    }
    left_out = {source: reader.left_out for source, reader in readers.items()}
    return chosen, {"sources": sources, "left_out": left_out}


def by_weight(counts: list[int], weights: list[float | None]) -> list[int]:
    """Returns how many rows of each source are mixed: all, where no weight is given.

    With weights they stand in that proportion and no row is repeated: the source that
    is used up first sets the total. No weight among others counts as 1.

    >>> by_weight([1000, 300], [3, 1]), by_weight([1000, 300], [None, None])
    ([900, 300], [1000, 300])
    """
    if not any(weights):
        return counts
    parts = [weight or 1.0 for weight in weights]
    unit = min(count / part for count, part in zip(counts, parts, strict=True))
    return [max(1, round(unit * part)) for part in parts]


def divide(
    config: DataConfig, spool: Spool, chosen: array[int]
) -> tuple[dict[str, array[int]], Reader]:
    """Returns the numbers on the spool of each part, and what training leaves out.

    A conversation that asks later what a held-out one asks first is not trained on.
    """
    limits = {"test_chat": config.test_rows, "eval": config.eval_rows}
    shares = {"test_chat": config.test_share, "eval": config.eval_share}
    given = {name: share for name, share in shares.items() if share}
    groups = {name: array("Q") for name in ["train", *given]}
    sides = split((spool.places[number] for number in chosen), given)
    for number, side in zip(chosen, sides, strict=True):
        groups[side].append(number)
    held = {spool.places[number] for name in given for number in groups[name]}
    again, kept = Reader("the mix"), array("Q")
    for number in groups["train"] if held else ():
        leaked = [q for q in questions_of(spool[number])[1:] if place_of(q) in held]
        if leaked:
            again.leave_out("asks later what is held out", normal(leaked[0])[:60])
        else:
            kept.append(number)
    groups["train"] = kept if held else groups["train"]
    return {name: part[: limits.get(name)] for name, part in groups.items()}, again


def held_in_memory(run: Run) -> dict[str, list[Row]]:
    """Returns the rows of the parts that are read whole: problems, tests, eval rows."""
    config, parts = run.config.data, dict[str, list[Row]]()
    problem_rows = load_rows(config.problems) if config.problems else []
    if config.eval:
        if config.eval == config.problems:
            problem_rows, rows = share_problems(config, problem_rows)
        else:
            rows = load_rows(config.eval, config.eval_rows)
        conversations, _ = to_conversations(
            rows[: config.eval_rows],
            run.config.system_prompt,
            config.eval,
            form=parse_source(config.eval).format,
            drop_unusable=config.drop_unusable,
        )
        parts["eval"] = list(with_ids(conversations))
    if config.problems:
        parts["problems"] = to_problems(problem_rows, config.problems)
    for name in ("test", "test_new"):
        source, limit = getattr(config, name), getattr(config, f"{name}_rows")
        if source:
            parts[name] = to_problems(load_rows(source, limit), source)
    return parts


def share_problems(config: DataConfig, rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Returns one source's rows as problems and, the last ones, for the eval loss."""
    cut = len(rows) - (config.eval_rows or max(1, len(rows) // 10))
    if cut < 1:
        raise DataError(
            f"{config.problems} has {len(rows)} rows and serves as problems and as "
            f"eval; eval_rows={config.eval_rows} leaves no problem"
        )
    return rows[:cut], rows[cut:]


def with_ids(conversations: Iterable[Messages]) -> Iterator[Row]:
    """Yields `{"id", "messages"}` rows, the id being a hash of the content."""
    return ({"id": fingerprint(m), "messages": m} for m in conversations)


def write_rows(path: Path, rows: Iterable[Row]) -> tuple[int, str]:
    """Writes rows as JSON lines, one by one; returns their number and fingerprint.

    A reader, or a kill, never meets half of the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    digest, count = hashlib.sha256(), 0
    try:
        with scratch.open("wb") as file:
            for row in rows:
                line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
                file.write(line)
                digest.update(line)
                count += 1
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    return count, digest.hexdigest()[:12]


def stream_rows(path: Path) -> Iterator[Row]:
    """Yields the rows of a JSON-lines file of ours, one at a time."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Returns the lines of a file that are not empty, with their numbers."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return ((n, line) for n, line in enumerate(lines, start=1) if line.strip())


def read_rows(path: Path) -> list[Row]:
    """Returns the rows of a JSON-lines file of ours."""
    return list(stream_rows(path))


def made_from(run: Run) -> str:
    """Returns the fingerprint of the settings that decide what `data/` holds."""
    config = run.config
    return fingerprint(config.data.model_dump(), config.system_prompt, config.seed)


def ensure_data(run: Run) -> Path:
    """Returns the run's `data/`, preparing it first, with a word, where it must be.

    That is where a part is missing, or where it was prepared from other settings.
    """
    folder = run.path / "data"
    old = run.report().get("data", {}).get("made_from", made_from(run))
    parts = parts_of(run.config.data)
    if not all((folder / f"{name}.jsonl").exists() for name in parts):
        print(f"{folder} is missing (notebook 01_data_prep makes it): preparing it now")  # noqa: T201
        prepare(run)
    elif old != made_from(run):
        print(f"{folder} was made from other settings: preparing it anew")  # noqa: T201
        prepare(run)
    return folder
