"""Mixes and splits the rows of a run's sources, and writes them into its `data/`.

Conversations go through a file, so that memory does not grow with their length.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import tempfile
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, NamedTuple

from helpers.config import HELD_OUT, DataConfig, Source
from helpers.data.formats import Fields, Messages, Row
from helpers.data.reading import SHOWN, Reader
from helpers.data.sources import content_of, open_rows
from helpers.errors import DataError
from helpers.files import fingerprint, write_rows
from helpers.runs import Run

log = logging.getLogger(__name__)
PARTS = ["train", "problems", *HELD_OUT]  # the files of a run's `data/`
SETS = ("eval", "problems", "test", "test_new")  # those with sources of their own


def questions_of(messages: Messages) -> list[str]:
    """Returns the user turns, by which leaks are found."""
    return [m["content"] for m in messages if m["role"] == "user"]


def first_answer(messages: Messages) -> dict[str, Any]:
    """Returns the first answer of a conversation that is learnt."""
    return next(
        m for m in messages if m["role"] == "assistant" and m.get("weight") != 0
    )


def first_question(messages: Messages) -> Messages:
    """Returns a conversation up to its first answer that is learnt, a prompt."""
    number = messages.index(first_answer(messages))
    return [{"role": m["role"], "content": m["content"]} for m in messages[:number]]


# splits


def normal(question: str) -> str:
    """Returns a question as it is compared: white space does not count."""
    return " ".join(question.split())


def place_of(question: str) -> float:
    """Returns a number from 0 to 1, a hash of the question alone."""
    digest = hashlib.sha256(normal(question).encode()).hexdigest()
    return int(digest[:12], 16) / 16**12


def split(places: Iterable[float], shares: dict[str, float]) -> list[str]:
    """Returns the split of each conversation: a name of `shares`, or `train`.

    The first question decides, so that no row changes its split when data are added. A
    split that would be empty takes the conversations of the lowest hash.
    """
    places = list(places)
    ends = list(zip(shares, accumulate(shares.values()), strict=True))
    splits = [next((name for name, end in ends if p < end), "train") for p in places]
    for name in shares:
        if name not in splits:
            pairs = list(zip(places, splits, strict=True))
            lowest = min((p for p, part in pairs if part == "train"), default=None)
            splits = [name if p == lowest else part for p, part in pairs]
    if "train" not in splits:
        raise DataError(
            f"{len(set(places))} different questions, of which {' and '.join(shares)} "
            f"take {sum(shares.values()):.0%}: none is left to train on; give more rows"
        )
    return splits


def assert_disjoint(train: Iterable[str], held_out: dict[str, list[str]]) -> None:
    """Raises DataError when a held-out question is among those trained on."""
    known = {normal(question) for question in chain.from_iterable(held_out.values())}
    trained = known.intersection(map(normal, train)) if known else known
    for name, questions in held_out.items():
        leaked = [question for question in questions if normal(question) in trained]
        if leaked:
            raise DataError(
                f"{len(leaked)} questions of {name} are in the training rows too, "
                f"the first: {leaked[0][:80]!r}; remove them from one side"
            )


def by_weight(counts: list[int], weights: list[float | None]) -> list[int]:
    """Returns how many rows of each source are mixed: all, where no weight is given.

    With weights the source that is used up first sets the total; none counts as 1.
    """
    if not any(weights):
        return counts
    parts = [weight or 1.0 for weight in weights]
    unit = min(count / part for count, part in zip(counts, parts, strict=True))
    return [max(1, round(unit * part)) for part in parts]


# the data of a run


def parts_of(config: DataConfig) -> list[str]:
    """Returns which of `PARTS` a run with this config has."""
    parts = {name: getattr(config, name, None) for name in PARTS}
    parts["eval"] = config.eval or (config.train and config.eval_share)
    parts["test_chat"] = config.train and config.test_share
    return [name for name in PARTS if parts[name]]


def answered(parts: Container[str]) -> list[str]:
    """Returns the held-out parts that models answer: of `eval` only if no others."""
    known = [name for name in HELD_OUT if name in parts]
    return [name for name in known if name != "eval"] or known


def prepare(run: Run) -> dict[str, Any]:
    """Writes the run's `data/` and returns its part of the report.

    Writes what the config has of `train.jsonl`, `eval.jsonl` and `test_chat.jsonl`
    (`id`, `messages`), `problems.jsonl`, `test.jsonl` and `test_new.jsonl` (`id`,
    `question`, `answer`, `gold`). Where a count is capped, training rows are drawn by
    the run's seed; of the other sets the first ones are taken.

    Args:
        run: with its config; what `data/` held before is replaced.

    Returns:
        Rows and fingerprint of each part, and of each source what was read and used,
        and what was left out.

    Raises:
        DataError: rows are unusable, or a held-out question would be trained on.
    """
    report: dict[str, Any] = {"sources": {}, "left_out": {}, "fingerprints": {}}
    report |= {"made_from": made_from(run), "inputs": inputs(run)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "mix.jsonl"
        groups = mix(run, file, report) if run.config.data.train else {}
        sets = read_sets(run, report)
        asked = {
            name: [r["question"] for r in sets[name]] for name in sets if name != "eval"
        }
        if "eval" in sets:
            asked["eval"] = [questions_of(row["messages"])[0] for row in sets["eval"]]
        trained = map(questions_of, load(file, groups["train"]) if groups else ())
        problems = asked.pop("problems", [])
        assert_disjoint(chain(problems, chain.from_iterable(trained)), asked)
        paths = {name: run.path / "data" / f"{name}.jsonl" for name in PARTS}
        for path in paths.values():  # first all, so that a kill leaves no old part
            path.unlink(missing_ok=True)
        for name in parts_of(run.config.data):
            chats = with_ids(load(file, groups[name])) if name in groups else sets[name]
            report[name], report["fingerprints"][name] = write_rows(paths[name], chats)
    run.write_part("data", report)
    return report


def open_reader(run: Run, source: str | Source, **options: Any) -> Reader:
    """Returns the reader of a source of a run."""
    return Reader(
        str(source),
        source.format if isinstance(source, Source) else None,
        run.config.system_prompt,
        drop_unusable=run.config.data.drop_unusable,
        fields=Fields(tuple(run.config.data.ignore)),
        **options,
    )


class Mixed(NamedTuple):
    """A conversation that is stored in a file."""

    source: int
    offset: int  # of its line, in bytes
    asked: list[float]  # `place_of` its questions


def load(file: Path, rows: Iterable[Mixed]) -> Iterator[Messages]:
    """Yields conversations from the file that they are stored in."""
    with file.open("rb") as stream:
        for row in rows:
            stream.seek(row.offset)
            yield json.loads(stream.readline())


def mix(run: Run, file: Path, report: dict[str, Any]) -> dict[str, list[Mixed]]:
    """Returns the splits of all train sources, shuffled; the turns are in the file."""
    config, seen = run.config.data, set[int]()
    readers, rows = dict[str, Reader](), list[Mixed]()
    with file.open("wb") as stream:
        for number, source in enumerate(config.train):
            reader = open_reader(run, source, max_chars=config.max_chars, seen=seen)
            # another part of a source, or in another format
            again = f" ({number + 1})" if str(source) in readers else ""
            readers[f"{source}{again}"] = reader
            numbered = open_rows(source, config.train_rows, run.config.seed)
            for messages in reader.read(numbered):
                asked = list(map(place_of, questions_of(messages)))
                rows.append(Mixed(number, stream.tell(), asked))
                line = json.dumps(messages, ensure_ascii=False) + "\n"
                stream.write(line.encode())
    weights = [s.weight if isinstance(s, Source) else None for s in config.train]
    quotas = by_weight([reader.kept for reader in readers.values()], weights)
    for quota, (label, reader) in zip(quotas, readers.items(), strict=True):
        report["sources"][label] = reader.report(quota)
        report["left_out"][label] = reader.left_out
    random.Random(run.config.seed).shuffle(rows)
    used, taken = Counter[int](), list[Mixed]()
    for row in rows:
        used[row.source] += 1
        if used[row.source] <= quotas[row.source]:
            taken.append(row)
    shares = {"test_chat": config.test_share, "eval": config.eval_share}
    shares = {name: share for name, share in shares.items() if share}
    splits = split((row.asked[0] for row in taken), shares)  # type: ignore[arg-type]
    groups: dict[str, list[Mixed]] = {name: [] for name in ["train", *shares]}
    for row, name in zip(taken, splits, strict=True):
        groups[name].append(row)
    held = {row.asked[0] for name in shares for row in groups[name]}
    leaks = [row for row in groups["train"] if not held.isdisjoint(row.asked)]
    if leaks:
        openings = [questions_of(chat)[0][:60] for chat in load(file, leaks[:SHOWN])]
        counts = {"rows": len(leaks), "examples": openings}
        report["left_out"]["the mix"] = {"asks later what is held out": counts}
        groups["train"] = [r for r in groups["train"] if held.isdisjoint(r.asked)]
    limits = {"test_chat": config.test_rows, "eval": config.eval_rows}
    return {name: group[: limits.get(name)] for name, group in groups.items()}


def read_sets(run: Run, report: dict[str, Any]) -> dict[str, list[Row]]:
    """Returns the sets that are read whole: eval rows, problems and tests."""
    config, sets = run.config.data, dict[str, list[Row]]()
    for name in SETS:
        source, limit = getattr(config, name), getattr(config, f"{name}_rows", None)
        if not source:
            continue
        reader = open_reader(run, source)
        # of one source of both, the last rows are eval's
        shared = name in ("eval", "problems") and config.eval == config.problems
        rows = list(open_rows(source, None if shared else limit))
        if shared:
            count = config.eval_rows or max(1, len(rows) // 10)
            rows = rows[-count:] if name == "eval" else rows[:-count]
        if name == "eval":
            sets[name] = list(with_ids(reader.read(rows)))
        else:
            sets[name] = list(reader.problems(rows))
        report["sources"][name] = reader.report(len(sets[name]))
        report["left_out"][name] = reader.left_out
    return sets


def made_from(run: Run) -> str:
    """Returns the fingerprint of the settings that decide what `data/` holds."""
    config = run.config
    return fingerprint(config.data.model_dump(), config.system_prompt, config.seed)


def inputs(run: Run) -> dict[str, str]:
    """Returns a hash of the content of each source of a run, by its path, if known."""
    config = run.config.data
    sources = [*config.train, *(getattr(config, name) for name in SETS)]
    paths = dict.fromkeys(str(source) for source in sources if source)
    return {path: content for path in paths if (content := content_of(path))}


def ensure_data(run: Run) -> Path:
    """Returns the run's `data/`, prepared if parts, settings or sources have changed.

    Args:
        run: with its config.

    Raises:
        DataError: see `prepare`.
    """
    folder, report = run.path / "data", run.report().get("data", {})
    files = [folder / f"{name}.jsonl" for name in parts_of(run.config.data)]
    known, now = report.get("inputs", {}), inputs(run)
    changed = [path for path in now if known.get(path, now[path]) != now[path]]
    if not all(file.exists() for file in files):
        reason = "a part is missing (notebook 01_data_prep makes it)"
    elif report.get("made_from", made_from(run)) != made_from(run):
        reason = "it was made from other settings"
    elif changed:
        reason = f"changed since: {', '.join(changed)}"
    else:
        return folder
    log.info("%s is prepared now: %s", folder, reason)
    prepare(run)
    return folder


def with_ids(chats: Iterable[Messages]) -> Iterator[Row]:
    """Yields `{"id", "messages"}` rows, the id being a hash of the content."""
    return ({"id": fingerprint(messages), "messages": messages} for messages in chats)
