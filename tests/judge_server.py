"""A real server that speaks the protocol of OpenAI's chat completions, with its faults.

It runs on this machine in a thread, and answers by a function of the request.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Request = dict[str, Any]


def completion(text):
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
    protocol has it. Faults are worked off first, one a request: a status, a body, `cut`
    (the connection, amid the body), or seconds to wait before the answer.
    """

    def __init__(self, answer):
        self.answer = answer
        self.faults: list[Any] = []
        self.requests: list[Request] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                outer.handle(self)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def handle(self, handler):
        length = int(handler.headers["Content-Length"])
        request = json.loads(handler.rfile.read(length))
        with self.lock:
            self.requests.append(request)
            self.keys.append(handler.headers.get("Authorization"))
            fault = self.faults.pop(0) if self.faults else None
        if fault == "cut":
            return self.cut(handler)
        if isinstance(fault, str):
            return self.send(handler, 200, fault)
        if isinstance(fault, int):
            return self.send(handler, fault, '{"error": {"message": "oh"}}')
        time.sleep(fault or 0)
        answer = self.answer(request)
        if isinstance(answer, tuple):
            status, error = answer
            is_page = isinstance(error, str)
            return self.send(handler, status, error if is_page else {"error": error})
        return self.send(handler, 200, completion(answer))

    @staticmethod
    def send(handler, status, content, size=0):
        body = content if isinstance(content, str) else json.dumps(content)
        kind = "text/html" if body.startswith("<") else "application/json"
        with suppress(ConnectionError):  # the client has given up waiting
            handler.send_response(status)
            handler.send_header("Content-Type", kind)
            handler.send_header("Content-Length", str(size or len(body.encode())))
            handler.end_headers()
            handler.wfile.write(body.encode())

    @staticmethod
    def cut(handler):
        JudgeServer.send(handler, 200, '{"id": "1", "choices": [', 4096)
        handler.wfile.flush()
        linger = struct.pack("ii", 1, 0)  # reset, not closed
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        handler.connection.close()
