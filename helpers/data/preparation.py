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
from collections.abc import Container, Iterable, Iterator
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

from helpers.config import HELD_OUT, DataConfig, Source
from helpers.data.formats import Fields, Messages, Row
from helpers.data.reading import LeftOut, Reader, leave_out
from helpers.data.reading import to_conversations as to_conversations
from helpers.data.reading import to_problems as to_problems
from helpers.data.sources import content_of, open_rows
from helpers.data.sources import load_rows as load_rows
from helpers.data.splits import assert_disjoint, normal, place_of, split
from helpers.data.spool import Spool, questions_of
from helpers.errors import DataError
from helpers.runs import Run, fingerprint

# the files of a run's `data/`
PARTS = ["train", "problems", *HELD_OUT]


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
    """Returns a conversation up to its first answer that is learnt, a prompt."""
    number = messages.index(first_answer(messages))
    return [{"role": m["role"], "content": m["content"]} for m in messages[:number]]


def first_answer(messages: Messages) -> dict[str, Any]:
    """Returns the first answer of a conversation that is learnt."""
    return next(
        m for m in messages if m["role"] == "assistant" and m.get("weight") != 0
    )


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


def answered(parts: Container[str]) -> list[str]:
    """Returns the held-out parts that models answer: problems, test conversations.

    Those of `eval` only where there is nothing else; otherwise they give a loss alone.
    """
    known = [name for name in HELD_OUT if name in parts]
    return [name for name in known if name != "eval"] or known


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
    config, contents = run.config.data, inputs(run)
    with tempfile.TemporaryFile() as file:
        spool = Spool(file)
        groups: dict[str, array[int]] = {}
        report: dict[str, Any] = {"sources": {}, "left_out": {}}
        if config.train:
            chosen, report = mix(run, spool)
            groups, leaks = divide(config, spool, chosen)
            if leaks:
                report["left_out"]["the mix"] = leaks
        sets = {}
        for name, (part, reader) in held_in_memory(run).items():
            sets[name] = part
            report["sources"][name] = reader.report(len(part))
            report["left_out"][name] = reader.left_out
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
    report["inputs"] = contents
    run.write_part("data", report)
    return report


def open_reader(run: Run, source: str | Source, **options: Any) -> Reader:
    """Returns the reader of a source of a run."""
    config = run.config.data
    return Reader(
        str(source),
        source.format if isinstance(source, Source) else None,
        run.config.system_prompt,
        drop_unusable=config.drop_unusable,
        fields=Fields(tuple(config.ignore)),
        **options,
    )


def mix(run: Run, spool: Spool) -> tuple[array[int], dict[str, Any]]:
    """Fills the spool from all train sources; returns which to use, and a report.

    The numbers on the spool are shuffled by the run's seed, all of them, as a full
    shuffle of numbers costs little memory; a buffer would leave the sources apart.
    """
    config, seen = run.config.data, set[int]()
    readers: dict[str, Reader] = {}
    for source in config.train:
        reader = open_reader(run, source, max_chars=config.max_chars, seen=seen)
        label = str(source)
        if label in readers:  # another part of it, or in another format
            label += f" ({len(readers) + 1})"
        readers[label] = reader
        rows = open_rows(source, config.train_rows, run.config.seed)
        for messages in reader.read(rows):
            spool.append(messages)
    counts = [reader.kept for reader in readers.values()]
    weights = [s.weight if isinstance(s, Source) else None for s in config.train]
    quotas, taken = by_weight(counts, weights), [0] * len(counts)
    ends, chosen = list(accumulate(counts)), array("Q")
    order = array("Q", range(sum(counts)))
    random.Random(run.config.seed).shuffle(order)
    for number in order:
        of = bisect_right(ends, number)
        if taken[of] < quotas[of]:
            taken[of] += 1
            chosen.append(number)
    pairs = zip(readers.items(), taken, strict=True)
    sources = {label: reader.report(rows) for (label, reader), rows in pairs}
    left_out = {label: reader.left_out for label, reader in readers.items()}
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
) -> tuple[dict[str, array[int]], LeftOut]:
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
    leaks: LeftOut = {}
    free = array("Q")
    for number in groups["train"] if held else ():
        leaked = [q for q in questions_of(spool[number])[1:] if place_of(q) in held]
        if leaked:
            leave_out(leaks, "asks later what is held out", normal(leaked[0])[:60])
        else:
            free.append(number)
    groups["train"] = free if held else groups["train"]
    return {name: part[: limits.get(name)] for name, part in groups.items()}, leaks


def held_in_memory(run: Run) -> dict[str, tuple[list[Row], Reader]]:
    """Returns the parts that are read whole, problems, tests and eval rows, by name."""
    config = run.config.data
    limits = {"eval": config.eval_rows, "problems": None}
    limits |= {"test": config.test_rows, "test_new": config.test_new_rows}
    given = {name: getattr(config, name) for name in limits if getattr(config, name)}
    shared = config.problems is not None and config.eval == config.problems
    parts = {}
    for name, source in given.items():
        rows = list(
            open_rows(source, None if shared and name == "eval" else limits[name])
        )
        if shared and name in ("eval", "problems"):
            rows = share_problems(config, rows)[name]
        reader = open_reader(run, source)
        if name == "eval":
            parts[name] = list(with_ids(reader.read(rows))), reader
        else:
            parts[name] = list(reader.problems(rows)), reader
    return parts


def share_problems(config: DataConfig, rows: list[Any]) -> dict[str, list[Any]]:
    """Returns one source's rows as problems and, the last ones, for the eval loss."""
    cut = len(rows) - (config.eval_rows or max(1, len(rows) // 10))
    if cut < 1:
        raise DataError(
            f"{config.problems} has {len(rows)} rows and serves as problems and as "
            f"eval; eval_rows={config.eval_rows} leaves no problem"
        )
    return {"problems": rows[:cut], "eval": rows[cut:]}


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


def inputs(run: Run) -> dict[str, str]:
    """Returns a hash of what each source of a run holds now, by its path.

    A source that is gone, or a hub out of reach, has none: nothing is known of it.
    """
    config = run.config.data
    sources = [
        *config.train,
        config.eval,
        config.problems,
        config.test,
        config.test_new,
    ]
    paths = dict.fromkeys(str(source) for source in sources if source)
    contents = {path: content_of(path) for path in paths}
    return {path: content for path, content in contents.items() if content}


def changed_inputs(run: Run) -> list[str]:
    """Returns the sources that hold something else than when `data/` was made."""
    known = run.report().get("data", {}).get("inputs", {})
    now = inputs(run)
    return [path for path in now if known.get(path, now[path]) != now[path]]


def remarks(report: dict[str, Any]) -> list[str]:
    """Returns a line for each source of which fields were not used, or turns changed.

    Args:
        report: of `prepare`.
    """
    lines = []
    for name, part in report.get("sources", {}).items():
        for title in ("unused", "adjusted"):
            counts = [f"{what} ({n:,})" for what, n in part.get(title, {}).items()]
            if counts:
                lines.append(f"{name}: {title}: {', '.join(counts)}")
    return lines


def ensure_data(run: Run) -> Path:
    """Returns the run's `data/`, preparing it first, with a note, where it must be.

    That is where a part is missing, or where it was prepared from other settings or
    from files that have changed since.
    """
    folder = run.path / "data"
    old = run.report().get("data", {}).get("made_from", made_from(run))
    parts = parts_of(run.config.data)
    if not all((folder / f"{name}.jsonl").exists() for name in parts):
        reason = "is missing (notebook 01_data_prep makes it): preparing it now"
    elif old != made_from(run):
        reason = "was made from other settings: preparing it anew"
    elif changed := changed_inputs(run):
        verb = "has" if len(changed) == 1 else "have"
        reason = f"is old, {' and '.join(changed)} {verb} changed: preparing it anew"
    else:
        return folder
    print(f"{folder} {reason}")  # noqa: T201
    for line in remarks(prepare(run)):
        print(line)  # noqa: T201
    return folder
