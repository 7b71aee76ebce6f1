"""Rows that several tests make."""

import json

from helpers.data.reading import Reader

ROWS = [
    {"prompt": "Say hi, twice.", "completion": 'hi "hi"'},
    {"prompt": "Grüße?", "completion": "Zwei\nZeilen 🎉"},
]

CHATML = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
}
"""The special tokens of a ChatML tokenizer, for `make_tokenizer`."""


def write(path, rows):
    """Writes JSON lines and returns the path as a source."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def turns(*contents, system=""):
    """Returns user and assistant turns in alternation."""
    messages = [{"role": "system", "content": system}] if system else []
    for number, content in enumerate(contents):
        role = ("user", "assistant")[number % 2]
        messages.append({"role": role, "content": content})
    return messages


def pair(question, answer="Yes."):
    """Returns a prompt/completion row."""
    return {"prompt": question, "completion": answer}


def problem(question, gold=5):
    return {"question": question, "answer": f"Working.\n#### {gold}"}


def messages_row(*roles):
    """Returns an OpenAI row whose turns have these roles."""
    return {"messages": [{"role": role, "content": role} for role in roles]}


def to_problems(rows, source="the rows"):
    return list(Reader(source).read(enumerate(rows, start=1), problems=True))
