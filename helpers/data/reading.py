"""Reads the numbered rows of a source into conversations, problems or prompts."""

import json
import logging
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from helpers.data import formats
from helpers.data.formats import Messages, Row, is_empty, text_of
from helpers.errors import DataError, nearest
from helpers.files import fingerprint
from helpers.grpo.answers import MARKER, parse_gold, parse_number

log = logging.getLogger(__name__)
SHOWN = 3  # examples of what was left out, for each reason
LEARNT = ("weight", "train", "training", "loss")  # 0 or false: read, not learnt
MARKS = dict.fromkeys(["0", "0.0", "false"], False)
MARKS |= dict.fromkeys(["1", "1.0", "true", "none"], True)
# they change what is learnt, and training renders none of them
REFUSED = "tools functions tool_calls function_call reasoning_content thinking".split()
SYSTEM = ("system", "system_prompt", "system_message")
CHATS = ("messages", "conversations")
# what is put before them: the `instruction` template has Dolly's three blocks
CONTEXTS = {"input": "", "context": "### Context:\n"}
FILTERS = ("empty answer", "no answer is learnt", "over-long", "duplicate")


@dataclass
class Reader:
    """Reads the rows of one source; counts and shows what it leaves out."""

    source: str = "the rows"  # for messages
    form: str | None = None  # the name of the format; None = detected
    system_prompt: str = ""  # put before problems, as in evaluation
    max_chars: int | None = None  # conversations with more are over-long
    drop_unusable: bool = False  # leave them out and count them, do not refuse all
    ignore: Collection[str] = ()  # fields of rows and turns that are not read
    seen: set[int] = field(default_factory=set)  # hashes of other sources' rows, too
    why: str = "asked for"  # how the format was found
    rows: int = 0
    used: int = 0
    left_out: dict[str, Row] = field(default_factory=dict)  # rows, examples by reason
    unused: Counter[str] = field(default_factory=Counter)  # fields
    adjusted: Counter[str] = field(default_factory=Counter)  # changes of rows
    golds: dict[str, Any] = field(default_factory=dict)  # by question
    ids: dict[str, str] = field(default_factory=dict)  # the questions of problems

    def report(self) -> Row:
        """Returns the source's part of the run's report; logs what was not used."""
        counts = {"unused": dict(self.unused), "adjusted": dict(self.adjusted)}
        for title, count in counts.items():
            if count:
                log.info("%s: %s: %s", self.source, title, count)
        rows = {"read": self.rows, "rows": self.used}
        return {"format": self.form, "why": self.why, **rows, **counts}

    def read(self, numbered: Iterable[tuple[int, Any]], problems: bool = False) -> Any:
        """Yields the conversations, or problems, of the rows that can be used."""
        numbered = iter(numbered)
        first = list(islice(numbered, 20))  # from them the format is detected
        if problems:
            self.form = "problems with a gold answer"
        elif self.form is None:
            samples = [row for _, row in first]
            self.form, self.why = formats.detect_format(samples, self.source)
        elif self.form not in formats.FORMATS:
            hint = nearest(self.form, formats.FORMATS)
            raise DataError(f"no format {self.form!r}{hint}; docs/data.md names them")
        for self.rows, (number, row) in enumerate(chain(first, numbered), start=1):
            try:
                row = self.strip(row)
                yield self.to_problem(row) if problems else self.to_messages(row)
                self.used += 1
            except DataError as error:
                reason = str(error).partition(": ")[0]
                part = self.left_out.setdefault(reason, {"rows": 0, "examples": []})
                part["rows"] += 1
                if part["rows"] <= SHOWN:
                    part["examples"].append(f"row {number}: {error}")
        reasons = [name for name in self.left_out if name not in FILTERS]
        if not self.used or (reasons and not self.drop_unusable):
            parts = [self.left_out[name] for name in reasons or self.left_out]
            shown = [example for part in parts for example in part["examples"]][:SHOWN]
            count = sum(part["rows"] for part in parts)
            text = f"{count} of {self.rows} rows cannot be used as {self.form}; "
            text += f"{'; '.join(shown)} (data.drop_unusable leaves such rows out; "
            raise DataError(f"{self.source}: {text}this format: {self.why})")

    def to_messages(self, row: Row) -> Messages:
        form = self.form or ""
        # `loss` may be a column of measurements; a false label is an unwanted answer
        marks = [MARKS.get(str(row.get(name)).lower()) for name in ("weight", "train")]
        unwanted = form == "prompt-completion" and row.get("label") is False
        if unwanted or False in marks:
            raise DataError("no answer is learnt: the row is marked so")
        if form in formats.READY_MADE and "text" in row:
            row["text"] = formats.cut_turns(form, text_of(row["text"], "text"))
        messages = self.read_columns(row, formats.FORMATS[form])
        answers = [turn for turn in messages if turn["role"] == "assistant"]
        if not answers:
            raise DataError("no assistant turn")
        if not all(turn["content"].strip() for turn in answers):
            raise DataError("empty answer")
        if all(turn.get("weight") == 0 for turn in answers):
            raise DataError("no answer is learnt")
        asked = next(turn["content"] for turn in messages if turn["role"] == "user")
        opening = " ".join(asked.split())[:60]
        length = sum(len(turn["content"]) for turn in messages)
        if self.max_chars and length > self.max_chars:
            raise DataError(f"over-long: {length:,} characters: {opening}")
        key = int(fingerprint(messages), 16)
        if key in self.seen:
            raise DataError(f"duplicate: {opening}")
        self.seen.add(key)
        if form == "gsm8k" and self.system_prompt and messages[0]["role"] == "user":
            if formats.is_solved(messages[-1]["content"]):
                return formats.ask("", self.system_prompt)[:1] + messages
            self.adjusted["no #### number, so no system prompt"] += 1
        return messages

    def to_problem(self, row: Row) -> Row:
        """Returns `{"id", "question", "answer", "gold"}`, the id being its own."""
        self.count(row, {"id", "question", "answer"})
        if is_empty(row.get("question")) or is_empty(row.get("answer")):
            raise DataError(f"no question or answer: the row has {', '.join(row)}")
        question, answer = (text_of(row[name], name) for name in ("question", "answer"))
        if MARKER not in answer and parse_number(answer.strip()) is not None:
            answer = f"{MARKER} {answer.strip()}"
        if (gold := parse_gold(answer)) is None:
            raise DataError(f"no gold number: the answer ends in {answer[-40:]!r}")
        if self.golds.setdefault(question, gold) != gold:
            raise DataError(f"two gold answers to one question: {question:.60}")
        key = str(row.get("id") or "")
        if not key or self.ids.setdefault(key, question) != question:
            key = fingerprint(question)  # pass rates go by it
        return {"id": key, "question": question, "answer": answer, "gold": str(gold)}

    def to_prompt(self, row: Any) -> Messages:
        """Returns a prompt, of a row of any format or a text with the system prompt."""
        row = self.strip({"prompt": row} if isinstance(row, str) else row)
        columns = ("prompt", "question", "instruction", *CHATS)
        column = next((n for n in columns if row.get(n) is not None), "prompt")
        turns = self.read_columns(row, [column])
        if not turns or turns[-1]["role"] != "user" or not turns[-1]["content"].strip():
            raise DataError("it does not end with a question")
        chat = column in CHATS or formats.has_turns(row[column])
        if not chat and turns[0]["role"] != "system":
            turns = formats.ask("", self.system_prompt)[:-1] + turns
        return [{"role": m["role"], "content": m["content"]} for m in turns]

    def strip(self, fields: Any) -> Row:
        if not isinstance(fields, dict):
            error = DataError(f"a row or turn is not an object: {fields!r:.40}")
            raise fields if isinstance(fields, DataError) else error
        return {n: value for n, value in fields.items() if n not in self.ignore}

    def count(self, fields: Row, used: set[str], refused: Collection[str] = ()) -> None:
        for name in (n for n in fields if n not in used and not is_empty(fields[n])):
            if name in refused:
                raise DataError(f"field {name!r} is not trained on; see data.ignore")
            self.unused[name] += 1

    def read_columns(self, row: Row, columns: list[str]) -> Messages:
        """Returns the turns of a row: its context, its question, and its answer."""
        question, answer = columns[0], columns[-1]
        more = CONTEXTS if question == "instruction" else {}
        self.count(row, {*columns, *SYSTEM, *more, "history", "id"}, REFUSED)
        if missing := {question, answer} - set(row):
            raise DataError(f"no {min(missing)!r}: the row has {', '.join(row)}")
        prompts = [row[name] for name in SYSTEM if not is_empty(row.get(name))]
        turns = [{"role": "system", "content": text_of(p, "system")} for p in prompts]
        history = [] if is_empty(row.get("history")) else row["history"]
        for pair in history if isinstance(history, list) else [history]:
            if not isinstance(pair, list) or len(pair) != 2:
                raise DataError(f"history is not question-answer pairs: {pair!r:.40}")
            turns += self.read_side(pair[0], "user", "history")
            turns += self.read_side(pair[1], "assistant", "history")
        prompt = row[question]
        for name, heading in more.items():
            if row.get(name) not in (None, ""):
                text = text_of(row[name], name)
                prompt = f"{text_of(prompt, question)}\n\n{heading}{text}"
        chat = self.read_side(prompt, "user", question)
        if answer != question:  # a prompt's former answers are not learnt
            chat = [t | {"weight": 0} if t["role"] == "assistant" else t for t in chat]
            chat += self.read_side(row[answer], "assistant", answer)
        turns += chat
        messages = formats.arrange(turns)
        if len(messages) < len(turns):
            self.adjusted["answer before the first question dropped"] += 1
        return messages

    def read_side(self, value: Any, role: str, place: str) -> Messages:
        """Returns the turns of a chat, or of one side: a text or a list of turns."""
        if place not in CHATS and not formats.has_turns(value):
            return [{"role": role, "content": text_of(value, f"the {role} turn")}]
        try:
            turns = json.loads(value) if isinstance(value, str) else value
        except ValueError:
            raise DataError(f"{place} is text that is not JSON: {value:.40}") from None
        if not isinstance(turns, list):
            raise DataError(f"{place} is not a list of turns: {turns!r:.40}")
        return list(map(self.read_turn, turns))

    def read_turn(self, turn: Any) -> Row:
        turn = self.strip(turn)
        used = {"from", "role", "value", "content", *LEARNT}
        self.count(turn, used, [*REFUSED, "reasoning", "train_detail"])
        roles = [str(turn[key]) for key in ("from", "role") if turn.get(key)]
        texts = [turn[key] for key in ("value", "content") if turn.get(key) is not None]
        if len(roles) != 1 or len(texts) != 1:
            raise DataError(f"a turn needs one role and one content: {turn!r:.80}")
        role = formats.ROLES.get(roles[0].strip().lower(), roles[0])
        marks = [MARKS.get(str(turn.get(name)).lower()) for name in LEARNT]
        if None in marks:
            raise DataError(f"a mark that is neither 0 nor 1: {turn!r:.80}")
        message: Row = {"role": role, "content": text_of(texts[0], f"the {role} turn")}
        return message if all(marks) else message | {"weight": 0}


def to_conversations(
    rows: Iterable[Any], system_prompt: str = "", **options: Any
) -> tuple[list[Messages], dict[str, Row]]:
    """Returns the rows as conversations, and what was left out, by reason.

    Args:
        rows: of any format, numbered from 1 in messages.
        system_prompt: put before problems that end in `#### <number>`.
        options: fields of `Reader`: `source`, `form`, `max_chars`, `drop_unusable`.

    Raises:
        DataError: rows cannot be read and are not to be dropped, or none is left.
    """
    reader = Reader(system_prompt=system_prompt, **options)
    return list(reader.read(enumerate(rows, start=1))), reader.left_out
