"""Conversations on disk while they are mixed and split."""

from __future__ import annotations

import json
from array import array
from typing import IO

from helpers.data.formats import Messages
from helpers.data.splits import place_of


def questions_of(messages: Messages) -> list[str]:
    """Returns the user turns, by which leaks are found."""
    return [m["content"] for m in messages if m["role"] == "user"]


class Spool:
    """Conversations in a file, by number: in memory lie 16 bytes of each."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.starts = array("Q")
        self.places = array("d")
        """Of the first questions, by which they are split."""

    def append(self, messages: Messages) -> None:
        """Writes a conversation behind the others; write all before reading any."""
        self.starts.append(self.file.tell())
        self.places.append(place_of(questions_of(messages)[0]))
        self.file.write(json.dumps(messages, ensure_ascii=False).encode() + b"\n")

    def __getitem__(self, number: int) -> Messages:
        self.file.seek(self.starts[number])
        return json.loads(self.file.readline())
