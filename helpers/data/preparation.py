"""Mixes and splits the rows of a run's sources, through a file, into its `data/`."""

import hashlib
import json
import logging
import random
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate, islice
from pathlib import Path
from typing import IO, Any

import pandas as pd

from helpers.config import HELD_OUT, SETS, DataConfig, Rows, RunConfig, Source
from helpers.data.formats import Row, answer_places, ask, is_solved
from helpers.data.reading import SHOWN, Reader
from helpers.data.sources import content_of, open_rows
from helpers.errors import DataError
from helpers.files import fingerprint, stream_rows, write_rows
from helpers.grpo.answers import parse_gold
from helpers.runs import Run, writes

log = logging.getLogger(__name__)
TRAINED = ["train", "problems"]
PARTS = [*TRAINED, *HELD_OUT]  # the files of a run's `data/`


def questions_of(row: Row) -> list[str]:
    """Returns the questions of a row of `data/`, by which leaks are found."""
    asked = [t["content"] for t in row.get("messages", []) if t["role"] == "user"]
    return asked or [row["question"]]


def held_out_questions(run: Run, count: int = 8) -> list[str]:
    """Returns questions of a run's first held-out set; of `train` where it has none."""
    files = (run.path / "data" / f"{name}.jsonl" for name in (*HELD_OUT, "train"))
    rows = islice(stream_rows(next(filter(Path.exists, files))), count)
    return [questions_of(row)[0] for row in rows]


def to_prompts(config: RunConfig, rows: list[Row], part: str = "") -> list[Row]:
    """Returns problems with their `prompt`, or conversations up to an answer.

    That is the first answer; of `general`, whole and without labels, it is the last.
    """
    if "question" in rows[0]:
        system = config.system_prompt
        return [row | {"prompt": ask(row["question"], system)} for row in rows]
    prompts, general, evaluation = [], part == "general", config.evaluation
    labels = [] if general else [x.strip() for x in evaluation.labels or []]
    rows = rows if general else rows[: evaluation.text_rows]
    chats = [row["messages"] for row in rows]
    pairs = [(turns, answer_places(turns)[-1 if general else 0]) for turns in chats]
    solved = not labels and all(is_solved(turns[n]["content"]) for turns, n in pairs)
    for row, (turns, n) in zip(rows, pairs, strict=True):
        answer = turns[n]["content"]
        if labels and answer.strip() not in labels:
            raise DataError(f"right answer {answer!r} is not among evaluation.labels")
        prompt = [{"role": m["role"], "content": m["content"]} for m in turns[:n]]
        texts = {"question": prompt[-1]["content"], "reference": answer}
        if solved:  # judged by the number, as problems are
            texts |= {"answer": answer, "gold": str(parse_gold(answer))}
        prompts.append({"id": row["id"], "prompt": prompt, **texts})
    return prompts


def place_of(question: str) -> float:
    """Returns a number from 0 to 1, a hash of the question without its white space."""
    digest = hashlib.sha256(" ".join(question.split()).encode()).hexdigest()
    return int(digest[:12], 16) / 16**12


def split(places: Iterable[float], shares: dict[str, float]) -> list[str]:
    """Returns the split at each place; one that would be empty takes the lowest."""
    places, names = list(places), [*shares, "train"]
    ends = list(accumulate(shares.values()))
    splits = {place: names[bisect_right(ends, place)] for place in places}
    for name in shares:
        if name not in splits.values() and "train" in splits.values():
            splits[min(p for p in splits if splits[p] == "train")] = name
    if "train" not in splits.values():
        text = f"different questions: {len(splits)}, too few, as "
        raise DataError(f"{text}{', '.join(names)} need one each; add rows")
    return [splits[place] for place in places]


def assert_disjoint(trained: set[float], name: str, questions: Iterable[str]) -> None:
    """Raises DataError when a held-out question is at a place that is trained on."""
    if leaks := [question for question in questions if place_of(question) in trained]:
        text = f"{len(leaks)} questions of {name} are in the training rows too, like "
        raise DataError(f"{text}{leaks[0][:80]!r}: remove them from one side")


def by_weight(counts: list[int], weights: list[float | None]) -> list[int]:
    """Returns how many rows of each source are mixed: all, or by weight (none is 1)."""
    if not any(weights):
        return counts
    parts = [weight or 1.0 for weight in weights]
    unit = min(count / part for count, part in zip(counts, parts, strict=True))
    return [max(1, round(unit * part)) for part in parts]


def sources_of(config: DataConfig) -> list[tuple[str, Rows]]:
    named = [(name, getattr(config, name)) for name in SETS if getattr(config, name)]
    return [*(("train", source) for source in config.train), *named]


def parts_of(config: DataConfig) -> list[str]:
    parts = {name: getattr(config, name, None) for name in PARTS}
    parts["eval"] = config.eval or (config.train and config.eval_share)
    parts["test_chat"] = config.train and config.test_share
    return [name for name in PARTS if parts[name]]


@writes
def prepare(run: Run, origin: Row | None = None) -> Row:
    """Writes the run's `data/`; returns counts, fingerprints, and what was left out.

    Rows are `id`, `messages`, or of problems `id`, `question`, `answer`, `gold`. Where
    a count is capped, training rows are drawn by the run's seed, else the first taken.

    Args:
        run: with its config; what `data/` held before is replaced.
        origin: `origin_of(run)`, where it is known.

    Raises:
        DataError: rows are unusable, or a held-out question would be trained on.
    """
    config = run.config.data
    report: Row = {"sources": {}, "left_out": {}, "fingerprints": {}}
    report |= origin or origin_of(run)
    with tempfile.TemporaryFile() as file:
        rows = read_sources(run, file, report)
        if config.train:
            rows = mix(run, rows, file, report)
        parts = {name: rows[rows["part"] == name] for name in parts_of(config)}
        trained = set(rows[rows["part"].isin(TRAINED)]["places"].explode())
        for name in [name for name in parts if name not in TRAINED]:
            place = -1 if name == "general" else 0  # of the question to answer
            asked = (questions_of(row)[place] for row in fetch(file, parts[name]))
            assert_disjoint(trained, name, asked)
        paths = {name: run.path / "data" / f"{name}.jsonl" for name in PARTS}
        for path in paths.values():  # first all, so that a kill leaves no old part
            path.unlink(missing_ok=True)
        for name, part in parts.items():
            results = write_rows(paths[name], fetch(file, part))
            report[name], report["fingerprints"][name] = results
    run.write_part("data", report)
    return report


def read_sources(run: Run, file: IO[bytes], report: Row) -> pd.DataFrame:
    """Returns each row's part, source, offset in the file, and places of questions."""
    config, table, seen = run.config.data, list[tuple[Any, ...]](), set[int]()
    for number, (part, source) in enumerate(sources_of(config), start=1):
        form = source.format if isinstance(source, Source) else None
        reader = Reader(str(source), form, run.config.system_prompt)
        reader.drop_unusable = config.drop_unusable
        reader.ignore = [name.rpartition(".")[2] for name in config.ignore]
        limit, seed = getattr(config, f"{part}_rows", None), None
        if part == "train":
            reader.max_chars, reader.seen = config.max_chars, seen
            seed = run.config.seed
        shared = part in ("eval", "problems") and config.eval == config.problems
        numbered = open_rows(source, None if shared else limit, seed)
        if shared:  # the last rows are eval's
            every = list(numbered)
            count = config.eval_rows or max(1, len(every) // 10)
            numbered = iter(every[-count:] if part == "eval" else every[:-count])
        label = str(source) if part == "train" else part
        if label in report["sources"]:  # another part of it, or in another format
            label += f" ({number})"
        chats = part in ("train", "eval", "general")
        for row in reader.read(numbered, problems=not chats):
            row = {"id": fingerprint(row), "messages": row} if chats else row
            places = list(map(place_of, questions_of(row)))
            table.append((part, label, file.tell(), places))
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        report["sources"][label] = reader.report()
        report["left_out"][label] = reader.left_out
    return pd.DataFrame(table, columns=["part", "source", "offset", "places"])


def fetch(file: IO[bytes], rows: pd.DataFrame) -> Iterator[Row]:
    for offset in rows["offset"]:
        file.seek(offset)
        yield json.loads(file.readline())


def mix(run: Run, rows: pd.DataFrame, file: IO[bytes], report: Row) -> pd.DataFrame:
    """Returns all rows; those for training are drawn by weight, shuffled and split."""
    config, others = run.config.data, rows[rows["part"] != "train"]
    rows = rows[rows["part"] == "train"]
    counts = rows["source"].value_counts(sort=False)
    weights = [getattr(source, "weight", None) for source in config.train]
    quotas = dict(zip(counts.index, by_weight(list(counts), weights), strict=True))
    for label, quota in quotas.items():
        report["sources"][label]["rows"] = quota
    order = list(rows.index)
    random.Random(run.config.seed).shuffle(order)
    rows = rows.loc[order]
    rows = rows[rows.groupby("source").cumcount() < rows["source"].map(quotas)]
    firsts = rows["places"].str[0]
    shares = {"test_chat": config.test_share, "eval": config.eval_share}
    rows = rows.assign(part=split(firsts, {n: s for n, s in shares.items() if s}))
    held = set(firsts[rows["part"] != "train"])
    limits = {"train": None, "test_chat": config.test_rows, "eval": config.eval_rows}
    drawn = [rows[rows["part"] == name][:most] for name, most in limits.items()]
    rows = pd.concat([*drawn, others])
    leaks = rows["part"].isin(TRAINED) & ~rows["places"].map(held.isdisjoint)
    if leaks.any():
        examples = [questions_of(r)[0][:60] for r in fetch(file, rows[leaks][:SHOWN])]
        part = {"rows": int(leaks.sum()), "examples": examples}
        report["left_out"]["the mix"] = {"asks what is held out": part}
    return rows[~leaks]


def origin_of(run: Run) -> Row:
    """Returns hashes of what `data/` is made from: settings, contents of sources."""
    config, data = run.config, run.config.data
    paths = dict.fromkeys(str(source) for _, source in sources_of(data))
    contents = {path: content for path in paths if (content := content_of(path))}
    settings = fingerprint(data.model_dump(), config.system_prompt, config.seed)
    return {"made_from": settings, "inputs": contents}


def ensure_data(run: Run) -> Path:
    """Returns the run's `data/`, by `prepare` if parts, settings or sources changed."""
    folder, origin = run.path / "data", origin_of(run)
    known = origin | run.report().get("data", {})
    old, new = known["inputs"], origin["inputs"]
    changed = [path for path in new if old.get(path, new[path]) != new[path]]
    if known["made_from"] != origin["made_from"]:
        changed = ["its settings"]
    files = [folder / f"{name}.jsonl" for name in parts_of(run.config.data)]
    if "fingerprints" not in known or not all(file.exists() for file in files):
        changed = ["a part is missing"]
    if changed:
        why = f"; changed: {', '.join(changed)}" if "fingerprints" in known else ""
        log.info("%s is prepared now%s", folder, why)
        prepare(run, origin)
    return folder
