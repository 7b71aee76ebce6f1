"""A chat with a model, streamed: the web page of a run, and the app of a Space.

It imports nothing of this project: exported, the same file is a Space's `app.py`.
"""

import html
import json
import os
import re
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Messages = list[Row]
Stream = Callable[..., Iterator[str]]  # of messages and sampling
# transformers' defaults, as llama.cpp calls them; what transformers calls otherwise
NEUTRAL = {"temperature": 1, "top_p": 1, "top_k": 50, "min_p": 0, "repeat_penalty": 1}
RENAMED = {"repetition_penalty": "repeat_penalty", "max_new_tokens": "max_tokens"}
START = {"temperature": 0, "top_p": 1, "max_new_tokens": 256}  # 0: greedy
# a server on this machine is asked past any proxy that the environment names
LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))
# the forms of control tokens, for a model whose tokenizer is out of reach
CONTROL = r"<[|｜][^\s<>]+>|<[^\s<>|]+[|｜]>|</?s>|<\w+_of_turn>|\[/?[A-Z_]{4,}\]"
CSS = ".message-content .md {white-space: pre-wrap; overflow-wrap: anywhere}"


def require(package: str) -> Any:
    try:
        return __import__(package)
    except ImportError:
        raise ImportError(f"{package} is missing: pip install {package}") from None


def break_control(messages: Messages, pattern: Any = CONTROL) -> Messages:
    """Returns turns with a joiner, not seen, in what a pattern finds: plain text."""

    def split(token: re.Match[str]) -> str:
        warnings.warn(f"{token[0]} in a text is read as plain text", stacklevel=2)
        return token[0][0] + "\u2060" + token[0][1:]

    return [m | {"content": re.sub(pattern, split, m["content"])} for m in messages]


@contextmanager
def open_gguf(path: Path, *, context: int = 4096) -> Iterator[str]:
    """Yields a local llama.cpp server's address; `context` tokens a conversation."""
    llama = require("xllamacpp")
    params = llama.CommonParams()
    params.model.path, params.hostnames, params.port = str(path), ["127.0.0.1"], 0
    params.n_ctx, params.n_parallel, params.verbosity = context, 1, -1
    params.ui = params.endpoint_slots = params.endpoint_props = False
    params.cors_origins = "http://127.0.0.1"  # else any site's page reads the answers
    params.reasoning_format = llama.common_reasoning_format(0)  # thoughts are text
    try:
        server = llama.Server(params)
    except RuntimeError as error:
        raise OSError(f"llama.cpp cannot load {path}: {error}") from None
    yield server.listening_address


def llama_settings(sampling: Row) -> Row:
    """Returns llama.cpp's settings for transformers'; ValueError for what it lacks."""
    values = {RENAMED.get(name, name): value for name, value in sampling.items()}
    limit = {name: values.pop(name) for name in {"max_tokens"} & values.keys()}
    drawn = values.pop("do_sample", values != {})
    if unknown := values.keys() - NEUTRAL.keys():
        raise ValueError(f"llama.cpp has no {', '.join(sorted(unknown))}")
    is_greedy = not drawn or values.get("temperature") == 0
    return NEUTRAL | ({"temperature": 0} if is_greedy else values) | limit


def post(url: str, values: Row) -> Any:
    """Returns the open response of `open_gguf`'s server; ValueError in its words."""
    request = urllib.request.Request(url, json.dumps(values).encode())
    request.add_header("Content-Type", "application/json")
    try:
        return LOCAL.open(request)
    except urllib.request.HTTPError as error:
        raise ValueError(json.load(error)["error"]["message"]) from None


def stream_gguf(url: str, messages: Messages, sampling: Row) -> Iterator[str]:
    """Yields an answer's text so far, once a token, from the server of `open_gguf`."""
    values = {"max_tokens": START["max_new_tokens"], **llama_settings(sampling)}
    values |= {"messages": break_control(messages)}
    values |= {"stream": True, "timings_per_token": True}
    text, tokens = "", 0
    with post(f"{url}/v1/chat/completions", values) as response:
        for line in response:
            part = json.loads(line[6:]) if line.startswith(b"data: {") else {}
            if "error" in part:
                raise ValueError(part["error"]["message"])
            if "timings" in part and not part["choices"][0]["finish_reason"]:
                text += part["choices"][0]["delta"].get("content") or ""
                before, tokens = tokens, part["timings"]["predicted_n"]
                yield from [text.strip()] * (tokens - before)


def build_page(stream: Stream, note: str, settings: Row, compare: bool = False) -> Any:
    """Returns a chat's Gradio page; `settings`: title, system_prompt and sampling."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    gr = require("gradio")
    start = START | settings["sampling"]
    labels = ["tuned", "base"] if compare else ["answers"]

    def respond(box: str, turns: Any, system: str, both: bool, *values: float) -> Any:
        drawing = start | dict(zip(start, values, strict=False))
        head = [{"role": "system", "content": system}] if system.strip() else []
        message, lines, box = box.strip(), dict[str, str](), ""
        if both and not turns["base"]:  # compared are whole conversations
            turns = {label: [] for label in labels}
        for label in labels[: 1 + both] if message else []:
            answer, chat = {"role": "assistant", "content": ""}, turns[label]
            chat += [{"role": "user", "content": message}, answer]
            base = {"adapter": False} if label == "base" else {}
            begin, first = time.perf_counter(), 0.0
            try:
                yield show("", turns, lines)
                texts = stream([*head, *chat[:-1]], drawing, **base)
                for count, answer["content"] in enumerate(texts, 1):
                    seconds = time.perf_counter() - begin
                    first = first or seconds
                    rate = f"{count / seconds:.1f} tokens/s, first after {first:.2f} s"
                    lines[label] = f"{label}: {rate}"
                    yield show("", turns, lines)
            except ValueError as error:
                lines[label], box = f"{label}: {error}", message
            else:
                lines.setdefault(label, f"{label}: an empty answer")
            finally:
                if not answer["content"]:
                    del chat[-2:]
        yield show(box, turns, lines)

    def show(box: str, turns: dict[str, Messages], lines: dict[str, str]) -> list[Any]:
        chats = [[m | as_text(m["content"]) for m in turns[n]] for n in labels]
        return [box, *chats, "\n".join(lines.values()), turns]

    def restart() -> list[Any]:
        return [*([] for _ in labels), "", {label: [] for label in labels}]

    with gr.Blocks(title=settings["title"]) as page:
        gr.HTML(f"<h1>{html.escape(settings['title'])}</h1>{html.escape(note)}")
        turns = gr.State({label: [] for label in labels})
        plain = {"render_markdown": False, "latex_delimiters": [], "buttons": []}
        with gr.Row():
            chats = [gr.Chatbot(label=n, visible=n != "base", **plain) for n in labels]
        status = gr.Textbox(show_label=False, container=False, interactive=False)
        box = gr.Textbox(label="Message", placeholder="Type, then press Enter")
        with gr.Row():
            send, stop, new = map(gr.Button, ("Send", "Stop", "New conversation"))
            both = gr.Checkbox(label="Compare with the base", visible=compare)
        with gr.Row():
            ranges = [(0, 2, 0.05), (0.05, 1, 0.05), (1, 2048, 1)]
            sliders = [
                gr.Slider(low, max(high, start[n]), start[n], step=step, label=n)
                for n, (low, high, step) in zip(start, ranges, strict=False)
            ]
        system = gr.Textbox(settings["system_prompt"], label="System prompt", lines=2)
        values, chats = [box, turns, system, both, *sliders], [*chats, status, turns]
        asks, outputs = [box.submit, send.click], [box, *chats]
        hidden: Row = {"api_visibility": "undocumented", "show_progress": "minimal"}
        answering = gr.on(asks, respond, values, outputs, api_name="chat", **hidden)
        # queued, the end of their streams could end an answer's that begins just then
        hidden, halt = hidden | {"queue": False}, {"cancels": [answering]}
        stop.click(None, **halt)
        clears = [new.click, *(chat.clear for chat in chats[:-2])]
        gr.on(clears, restart, None, chats, api_name="new", **halt, **hidden)
        both.change(lambda on: gr.Chatbot(visible=on), both, chats[-3], **hidden)
    return page


def as_text(text: str) -> Row:
    # Gradio renders HTML, and takes the indentation away of all but parts
    return {"content": [{"type": "text", "text": html.escape(text, quote=False)}]}


def launch(page: Any, **options: Any) -> None:
    """Serves a page, by default on loopback alone: no public link, no uploads."""
    theme = require("gradio").themes.Default(font="system-ui", font_mono="monospace")
    options |= {"share": False, "mcp_server": False, "enable_monitoring": False}
    options |= {"run_history": False, "max_file_size": 1, "footer_links": []}
    page.queue(api_open=False).launch(theme=theme, css=CSS, show_error=True, **options)


def main() -> None:
    file = Path(__file__).resolve().with_name("settings.json")
    settings = json.loads(file.read_text("utf-8"))
    path = file.with_name(settings["model"])
    with open_gguf(path) as url:
        stream, note = partial(stream_gguf, url), f"{path.name}, llama.cpp"
        launch(build_page(stream, note, settings))


if __name__ == "__main__":
    main()
