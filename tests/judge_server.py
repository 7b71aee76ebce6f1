"""A real server that speaks the protocol of OpenAI's chat completions, with its faults.

It runs on this machine in a thread, and answers by a function of the request.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Request = dict[str, Any]


def completion(text: str | None) -> dict[str, Any]:
    """A chat completion as the protocol has it; its one token's log-probability too."""
    token = {"token": text, "bytes": None, "logprob": -0.1}
    choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
    choice["message"] = {"role": "assistant", "content": text}
    choice["logprobs"] = {"content": [{**token, "top_logprobs": [token]}]}
    usage = {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}
    head = {"id": "1", "object": "chat.completion", "created": 1, "model": "local"}
    return {**head, "choices": [choice], "usage": usage}


class JudgeServer:
    """Answers `/v1/chat/completions`; a context manager.

    The answer to a request is a text, or `(status, error)`, an error as OpenAI's
    protocol has it. Faults are worked off first, one a request: a status,
    `(status, headers)`, a body, `cut` (the connection, amid the body), or seconds to
    wait before the answer.
    """

    def __init__(self, answer: Callable[[Request], Any]) -> None:
        self.answer = answer
        self.faults: list[Any] = []
        self.requests: list[Request] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.handle(self)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self) -> JudgeServer:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.server.server_close()

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        length = int(handler.headers["Content-Length"])
        request = json.loads(handler.rfile.read(length))
        with self.lock:
            self.requests.append(request)
            self.keys.append(handler.headers.get("Authorization"))
            fault = self.faults.pop(0) if self.faults else None
        status, headers = fault if isinstance(fault, tuple) else (fault, {})
        if handler.path != "/v1/chat/completions":
            return self.send(handler, 404, b'{"error": {"message": "no such page"}}')
        if fault == "cut":
            return self.cut(handler)
        if isinstance(status, str):
            return self.send(handler, 200, status.encode())
        if isinstance(status, int):
            return self.send(handler, status, b'{"error": {"message": "oh"}}', headers)
        if isinstance(fault, float):
            time.sleep(fault)
        answer = self.answer(request)
        if isinstance(answer, tuple):
            status, error = answer
            page = isinstance(error, str) and error.startswith("<")
            body = error if page else json.dumps({"error": error})
            return self.send(handler, status, body.encode())
        return self.send(handler, 200, json.dumps(completion(answer)).encode())

    @staticmethod
    def send(
        handler: BaseHTTPRequestHandler,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
    ) -> None:
        kind = "text/html" if body.startswith(b"<") else "application/json"
        size = {"Content-Type": kind, "Content-Length": str(len(body))}
        try:
            handler.send_response(status)
            for name, value in {**size, **(headers or {})}.items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(body)
        except ConnectionError:
            pass  # the client has given up waiting

    @staticmethod
    def cut(handler: BaseHTTPRequestHandler) -> None:
        size = {"Content-Length": "4096"}
        JudgeServer.send(handler, 200, b'{"id": "1", "choices": [', size)
        handler.wfile.flush()
        linger = struct.pack("ii", 1, 0)  # reset, not closed
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        handler.connection.close()
