"""Reads, filters, mixes and splits rows into the `data/` of a run.

Conversations go through an Arrow file, so that memory does not grow with their length.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.config import HELD_OUT, DataConfig, Source
from helpers.data.formats import (
    FORMATS,
    Fields,
    Format,
    Messages,
    Row,
    check_messages,
    detect_format,
    find_format,
    is_solved,
    read_problem,
    read_row,
)
from helpers.data.sources import content_of, open_rows
from helpers.data.sources import load_rows as load_rows
from helpers.errors import DataError
from helpers.runs import Run, fingerprint

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

# the files of a run's `data/`
PARTS = ["train", "problems", *HELD_OUT]
PEEK = 20  # rows that the format is detected from
SHOWN = 3  # examples of what was left out, for each reason
# never a reason to refuse all
FILTERS = ("empty answer", "no answer is learnt", "over-long", "duplicate")
LeftOut = dict[str, dict[str, Any]]  # `rows`, a number, and `examples`, by reason


# a conversation


def ask(question: str, system_prompt: str, shots: Messages | None = None) -> Messages:
    """Returns the prompt for a problem: the same in training, GRPO and evaluation.

    Args:
        question: the problem.
        system_prompt: the first turn, none if empty.
        shots: turns between the two.
    """
    messages = [*(shots or []), {"role": "user", "content": question}]
    if system_prompt:
        messages.insert(0, {"role": "system", "content": system_prompt})
    return messages


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


# rows -> conversations and problems


def leave_out(left_out: LeftOut, reason: str, example: str) -> None:
    """Counts what is left out for a reason, and keeps the first few as examples."""
    part = left_out.setdefault(reason, {"rows": 0, "examples": []})
    part["rows"] += 1
    if len(part["examples"]) < SHOWN:
        part["examples"].append(example)


@dataclass
class Reader:
    """Reads the numbered rows of one source; counts and shows what it leaves out."""

    source: str = "the rows"  # for messages
    form: str | None = None  # the name of the format; None = detected
    system_prompt: str = ""  # put before problems, as in evaluation
    max_chars: int | None = None  # conversations with more are over-long
    drop_unusable: bool = False  # leave them out and count them, do not refuse all
    seen: set[int] = field(default_factory=set)  # hashes of other sources' rows, too
    fields: Fields = field(default_factory=Fields)

    why: str = "asked for"  # how the format was found
    rows: int = 0
    kept: int = 0
    left_out: LeftOut = field(default_factory=dict)

    def report(self, used: int) -> Row:
        """Returns the source's part of the run's report; `used` rows are used."""
        return {
            "format": self.form,
            "why": self.why,
            "read": self.rows,
            "rows": used,
            "unused": dict(self.fields.unused),
            "adjusted": dict(self.fields.adjusted),
        }

    def read(self, rows: Iterable[tuple[int, Any]]) -> Iterator[Messages]:
        """Yields the conversations of numbered rows, one by one.

        Empty answers, duplicates and over-long conversations are always left out. No
        row stays in memory, but about 100 bytes of each to know it again.

        Raises:
            DataError: rows lack an expected field or break the turn order (numbers and
                reasons are given) and are not to be dropped, or no row is left.
        """
        rows = iter(rows)
        first = list(islice(rows, PEEK))
        if not first:
            raise DataError(f"{self.source} holds no rows")
        if self.form is None:
            samples = [row for _, row in first]
            if all(isinstance(row, DataError) for row in samples):
                raise DataError(f"{self.source}, row {first[0][0]}: {samples[0]}")
            self.form, self.why = detect_format(samples, self.source)
        form = find_format(self.form)
        function = partial(self.to_messages, form)
        yield from self.convert(chain(first, rows), function)

    def problems(self, rows: Iterable[tuple[int, Any]]) -> Iterator[Row]:
        """Yields numbered rows as problems, `{"id", "question", "answer", "gold"}`.

        Raises:
            DataError: rows have no question or no gold answer and are not dropped.
        """
        self.form = "problems with a gold answer"
        golds: dict[str, str] = {}
        ids: dict[str, str] = {}

        def to_problem(row: Any) -> Row:
            problem = read_problem(row, self.fields)
            question, gold = problem["question"], problem["gold"]
            if golds.setdefault(question, gold) != gold:
                raise DataError(
                    f"two gold answers to one question: {gold} and "
                    f"{golds[question]}: {question[:60]}"
                )
            key = problem["id"]
            if not key or ids.setdefault(key, question) != question:
                problem["id"] = fingerprint(question)  # pass rates go by it
            return problem

        return self.convert(rows, to_problem)

    def convert(
        self, rows: Iterable[tuple[int, Any]], function: Callable[[Any], Any]
    ) -> Iterator[Any]:
        """Yields what a function makes of each row; counts those that it refuses."""
        for number, row in rows:
            self.rows += 1
            try:
                if isinstance(row, DataError):
                    raise row
                result = function(row)
            except DataError as error:
                reason, _, details = str(error).partition(": ")
                shown = details if reason in ("duplicate", "over-long") else str(error)
                leave_out(self.left_out, reason, f"row {number}: {shown}")
                continue
            self.kept += 1
            yield result
        self.refuse_unusable()

    def to_messages(self, form: Format, row: Any) -> Messages:
        """Returns a row's messages; DataError gives the reason before a colon."""
        messages = read_row(form, row, self.fields)
        if fault := check_messages(messages):
            raise DataError(fault)
        opening = " ".join(questions_of(messages)[0].split())[:60]
        length = sum(len(m["content"]) for m in messages)
        if self.max_chars and length > self.max_chars:
            raise DataError(f"over-long: {length:,} characters: {opening}")
        key = int(fingerprint(messages), 16)
        if key in self.seen:
            raise DataError(f"duplicate: {opening}")
        self.seen.add(key)
        if form.name == "gsm8k" and self.system_prompt:
            if messages[0]["role"] != "system" and is_solved(messages[-1]["content"]):
                messages.insert(0, {"role": "system", "content": self.system_prompt})
            elif messages[0]["role"] != "system":
                self.fields.adjusted["no #### number, so no system prompt"] += 1
        return messages

    def refuse_unusable(self) -> None:
        """Raises DataError for rows that cannot be used, or when none is left."""
        counts = {reason: part["rows"] for reason, part in self.left_out.items()}
        unusable = [] if self.drop_unusable else [r for r in counts if r not in FILTERS]
        if self.kept and not unusable:
            return
        reasons = unusable or counts
        examples = [e for reason in reasons for e in self.left_out[reason]["examples"]]
        shown = "; ".join(examples[:SHOWN])
        if not unusable:
            listed = ", ".join(f"{n} {reason}" for reason, n in counts.items())
            raise DataError(
                f"{self.source}: no row is left of {self.rows} ({listed}): {shown}; "
                "correct these rows, or give others"
            )
        remedy = "data.drop_unusable in the config leaves such rows out"
        if self.why == "asked for" and self.form in FORMATS:
            remedy += "; without format in the source the format is detected"
        raise DataError(
            f"{self.source}: {sum(counts[r] for r in unusable)} of {self.rows} rows "
            f"cannot be used as {self.form}; {shown} ({remedy})"
        )


def to_conversations(
    rows: Iterable[Row],
    system_prompt: str = "",
    source: str = "the rows",
    **options: Any,
) -> tuple[list[Messages], LeftOut]:
    """Returns the rows as conversations, and what was left out, by reason.

    The options and the errors are those of `Reader`; rows are numbered from 1.

    >>> to_conversations([{"prompt": "Hi?", "completion": ""}] + 2 * [
    ...     {"prompt": "Hi?", "completion": "Hi."}])[1]["duplicate"]
    {'rows': 1, 'examples': ['row 3: Hi?']}
    """
    reader = Reader(source, system_prompt=system_prompt, **options)
    return list(reader.read(enumerate(rows, start=1))), reader.left_out


def to_problems(rows: Iterable[Any], source: str = "the rows") -> list[Row]:
    """Returns the rows as problems; the errors are those of `Reader.problems`."""
    return list(Reader(source).problems(enumerate(rows, start=1)))


# splits


def normal(question: str) -> str:
    """Returns a question as it is compared: white space does not count."""
    return " ".join(question.split())


def place_of(question: str) -> float:
    """Returns a number from 0 to 1, a hash of the question alone.

    >>> place_of("What is  a prime?") == place_of(" What is a prime?")
    True
    """
    digest = hashlib.sha256(normal(question).encode()).hexdigest()
    return int(digest[:12], 16) / 16**12


def split(places: Iterable[float], shares: dict[str, float]) -> list[str]:
    """Returns the split of each conversation: a name of `shares`, or `train`.

    The hash of the first question decides, so that a conversation stays in its split
    when data are added, and all that ask the same share one. A small set may leave a
    split empty; then it takes the conversations of the lowest hash.

    >>> split([0.02, 0.5, 0.07, 0.9], {"eval": 0.05})
    ['eval', 'train', 'train', 'train']

    Args:
        places: of the first questions, from `place_of`.
        shares: the part of the whole that each split gets, 0 to 1.

    Raises:
        DataError: nothing is left to train on.
    """
    places = list(places)
    ends = list(zip(shares, accumulate(shares.values()), strict=True))
    splits = [next((name for name, end in ends if p < end), "train") for p in places]
    for name in shares:
        if name not in splits:
            pairs = zip(places, splits, strict=True)
            lowest = min((p for p, part in pairs if part == "train"), default=None)
            pairs = zip(places, splits, strict=True)
            splits = [name if p == lowest else part for p, part in pairs]
    if "train" not in splits:
        raise DataError(
            f"{len(set(places))} different questions, of which "
            f"{' and '.join(shares)} take {sum(shares.values()):.0%}: none is left to "
            "train on; give more rows"
        )
    return splits


def assert_disjoint(train: Iterable[str], held_out: dict[str, Iterable[str]]) -> None:
    """Raises DataError when a held-out question is among those trained on.

    Args:
        train: the questions of the training rows; only one is held at a time.
        held_out: the questions of each held-out set, by the set's name.
    """
    sets = {name: list(questions) for name, questions in held_out.items()}
    known = {normal(question) for questions in sets.values() for question in questions}
    trained = known.intersection(map(normal, train)) if known else known
    for name, questions in sets.items():
        leaked = [question for question in questions if normal(question) in trained]
        if leaked:
            raise DataError(
                f"{len(leaked)} questions of {name} are in the training rows too, "
                f"the first: {leaked[0][:80]!r}; remove them from one side"
            )


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


# the data of a run


def parts_of(config: DataConfig) -> list[str]:
    """Returns which of `PARTS` a run with this config has."""
    parts = {name: getattr(config, name, None) for name in PARTS}
    parts["eval"] = config.eval or (config.train and config.eval_share)
    parts["test_chat"] = config.train and config.test_share
    return [name for name in PARTS if parts[name]]


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
    the run's seed; of the other sets the first ones are taken.

    Raises:
        DataError: rows are unusable, or a held-out question would be trained on.
    """
    contents = inputs(run)
    report: dict[str, Any] = {"sources": {}, "left_out": {}}
    with tempfile.TemporaryDirectory() as folder:
        groups = mix(run, Path(folder) / "mix.arrow", report)
        sets: dict[str, list[Row]] = {}
        for name, rows, reader in read_sets(run):
            sets[name] = rows
            report["sources"][name] = reader.report(len(rows))
            report["left_out"][name] = reader.left_out
        chats = conversations(groups["train"]) if groups else iter(())
        trained = chain.from_iterable(map(questions_of, chats))
        asked = {
            name: [row.get("question") or questions_of(row["messages"])[0] for row in x]
            for name, x in sets.items()
        }
        problems = asked.pop("problems", [])
        order = [name for name in HELD_OUT if name in asked]
        assert_disjoint(chain(trained, problems), {name: asked[name] for name in order})
        counts, prints = {}, {}
        paths = {name: run.path / "data" / f"{name}.jsonl" for name in PARTS}
        for path in paths.values():  # first all, so that a kill leaves no old part
            path.unlink(missing_ok=True)
        for name, path in paths.items():
            if name in groups:
                chats = conversations(groups[name])
                counts[name], prints[name] = write_rows(path, with_ids(chats))
            elif name in sets:
                counts[name], prints[name] = write_rows(path, sets[name])
    report = counts | report | {"fingerprints": prints, "made_from": made_from(run)}
    report["inputs"] = contents
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


def store(batches: Iterable[list[Row]], schema: Any, file: Path | None) -> Dataset:
    """Returns batches of rows as a dataset in an Arrow file; in memory without one."""
    import pyarrow as pa
    from datasets import Dataset

    sink = pa.OSFile(str(file), "wb") if file else pa.BufferOutputStream()
    with sink, pa.ipc.new_stream(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
    return (
        Dataset.from_file(str(file)) if file else Dataset.from_buffer(sink.getvalue())
    )


def conversations(table: Dataset) -> Iterator[Messages]:
    """Yields the conversations of a stored table."""
    for batch in table.iter(256):
        yield from map(json.loads, batch["messages"])


def mix(run: Run, file: Path, report: dict[str, Any]) -> dict[str, Dataset]:
    """Returns the splits of all train sources, shuffled by the run's seed.

    Adds to the report what was read and left out. The conversations are stored in the
    file; `asked` are the hashes of their questions.
    """
    import pyarrow as pa

    config, readers, seen = run.config.data, dict[str, Reader](), set[int]()
    if not config.train:
        return {}

    def read() -> Iterator[list[Row]]:
        for source in config.train:
            reader = open_reader(run, source, max_chars=config.max_chars, seen=seen)
            # another part of a source, or in another format
            again = f" ({len(readers) + 1})" if str(source) in readers else ""
            readers[f"{source}{again}"] = reader
            rows = reader.read(open_rows(source, config.train_rows, run.config.seed))
            while batch := list(islice(rows, 256)):
                yield [
                    {
                        "messages": json.dumps(messages, ensure_ascii=False),
                        "asked": list(map(place_of, questions_of(messages))),
                    }
                    for messages in batch
                ]

    schema = pa.schema({"messages": pa.string(), "asked": pa.list_(pa.float64())})
    table = store(read(), schema, file)
    counts = [reader.kept for reader in readers.values()]
    weights = [s.weight if isinstance(s, Source) else None for s in config.train]
    quotas, used = by_weight(counts, weights), Counter[int]()
    sources = [number for number, count in enumerate(counts) for _ in range(count)]
    order = list(range(len(table)))
    random.Random(run.config.seed).shuffle(order)
    rows = []
    for row in order:
        if used[sources[row]] < quotas[sources[row]]:
            used[sources[row]] += 1
            rows.append(row)
    for number, (label, reader) in enumerate(readers.items()):
        report["sources"][label] = reader.report(used[number])
        report["left_out"][label] = reader.left_out
    return divide(config, table, rows, report["left_out"])


def divide(
    config: DataConfig, table: Dataset, rows: list[int], left_out: LeftOut
) -> dict[str, Dataset]:
    """Returns the splits of the rows of a table.

    Drops training conversations whose later turns repeat a held-out question.
    """
    limits = {"test_chat": config.test_rows, "eval": config.eval_rows}
    shares = {"test_chat": config.test_share, "eval": config.eval_share}
    shares = {name: share for name, share in shares.items() if share}
    asked = list(table["asked"])
    groups: dict[str, list[int]] = {name: [] for name in ["train", *shares]}
    splits = split((asked[row][0] for row in rows), shares)  # type: ignore[arg-type]
    for row, name in zip(rows, splits, strict=True):
        groups[name].append(row)
    held = {asked[row][0] for name in shares for row in groups[name]}
    leaks: LeftOut = {}
    for row in groups["train"] if held else ():
        if held.intersection(asked[row]):
            questions = questions_of(json.loads(table[row]["messages"]))
            again = next(normal(q) for q in questions if place_of(q) in held)
            leave_out(leaks, "asks later what is held out", again[:60])
    if leaks:
        left_out["the mix"] = leaks
        groups["train"] = [r for r in groups["train"] if held.isdisjoint(asked[r])]
    return {n: table.select(part[: limits.get(n)]) for n, part in groups.items()}


def read_sets(run: Run) -> Iterator[tuple[str, list[Row], Reader]]:
    """Yields the sets that are read whole: eval rows, problems and tests.

    One source of both problems and eval rows is cut in two; its last rows are eval's.
    """
    config = run.config.data
    limits = {"eval": config.eval_rows, "problems": None}
    limits |= {"test": config.test_rows, "test_new": config.test_new_rows}
    shared = config.problems is not None and config.eval == config.problems
    for name, limit in limits.items():
        source = getattr(config, name)
        if not source:
            continue
        both = shared and name in ("eval", "problems")
        rows = list(open_rows(source, None if both else limit))
        if both:
            cut = len(rows) - (config.eval_rows or max(1, len(rows) // 10))
            if cut < 1:
                raise DataError(
                    f"{source} has {len(rows)} rows and serves as problems and as "
                    f"eval; eval_rows={config.eval_rows} leaves no problem"
                )
            rows = rows[cut:] if name == "eval" else rows[:cut]
        reader = open_reader(run, source)
        if name == "eval":
            yield name, list(with_ids(reader.read(rows))), reader
        else:
            yield name, list(reader.problems(rows)), reader


def made_from(run: Run) -> str:
    """Returns the fingerprint of the settings that decide what `data/` holds."""
    config = run.config
    return fingerprint(config.data.model_dump(), config.system_prompt, config.seed)


def inputs(run: Run) -> dict[str, str]:
    """Returns a hash of the content of each source of a run, by its path.

    A source that is gone, or a hub out of reach, has none.
    """
    config = run.config.data
    sources = [*config.train, config.eval, config.problems, config.test]
    sources = list(filter(None, [*sources, config.test_new]))
    contents = {path: content_of(path) for path in dict.fromkeys(map(str, sources))}
    return {path: content for path, content in contents.items() if content}


def changed_inputs(run: Run) -> list[str]:
    """Returns the sources whose content has changed since `data/` was written."""
    known = run.report().get("data", {}).get("inputs", {})
    now = inputs(run)
    return [path for path in now if known.get(path, now[path]) != now[path]]


def remarks(report: dict[str, Any]) -> list[str]:
    """Returns a line on the unused fields and changed turns of each source.

    Args:
        report: of `prepare`.
    """
    lines = []
    for name, part in report.get("sources", {}).items():
        for title in ("unused", "adjusted"):
            counts = [f"{what} ({n:,})" for what, n in part.get(title, {}).items()]
            lines += [f"{name}: {title}: {', '.join(counts)}"] if counts else []
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
    log.info("%s %s", folder, reason)
    for line in remarks(prepare(run)):
        log.info(line)
    return folder


# files


def with_ids(chats: Iterable[Messages]) -> Iterator[Row]:
    """Yields `{"id", "messages"}` rows, the id being a hash of the content."""
    return ({"id": fingerprint(messages), "messages": messages} for messages in chats)


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
        yield from map(json.loads, file)


def read_rows(path: Path) -> list[Row]:
    """Returns the rows of a JSON-lines file of ours."""
    return list(stream_rows(path))


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Returns the lines of a file that are not empty, with their numbers."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return ((n, line) for n, line in enumerate(lines, start=1) if line.strip())
