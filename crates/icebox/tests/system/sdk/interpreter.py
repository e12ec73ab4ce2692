"""What E2B's code interpreter asks of a sandbox, spoken by a few lines: contexts in which Python runs, and lines of JSON that
come as things are said. In a guest it stands in for Jupyter, which this is not about.
"""

import ast
import contextlib
import io
import json
import os
import sys
import threading
import time
import traceback
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PORT = 49999


class Context:
    def __init__(self, cwd):
        self.id = str(uuid.uuid4())
        self.cwd = cwd
        self.running = threading.Lock()
        self.restart()

    def restart(self):
        self.names, self.count = {"__name__": "__main__"}, 0

    def shown(self):
        return {"id": self.id, "language": "python", "cwd": self.cwd}


class Said(io.TextIOBase):
    """A stream whose every write is a line of the answer."""

    def __init__(self, kind, say):
        self.kind, self.say = kind, say

    def write(self, text):
        if text:
            self.say({"type": self.kind, "text": text, "timestamp": time.time_ns()})
        return len(text)


def run(context, code, say):
    tree = ast.parse(code)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(Said("stdout", say)), contextlib.redirect_stderr(Said("stderr", say)):
        exec(compile(tree, "<cell>", "exec"), context.names)
        value = None if last is None else eval(compile(ast.Expression(last.value), "<cell>", "eval"), context.names)
    if value is not None:
        say({"type": "result", "text": repr(value), "is_main_result": True})


MAIN = Context(os.getcwd())
CONTEXTS = {MAIN.id: MAIN}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def asked(self):
        return json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")

    def answer(self, body, status=200):
        body = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def context(self, identifier):
        if identifier not in CONTEXTS:
            self.answer({"detail": f"Context {identifier} not found"}, 404)
        return CONTEXTS.get(identifier)

    def do_GET(self):
        known = [it.shown() for it in CONTEXTS.values()]
        self.answer(known) if self.path == "/contexts" else self.answer({"detail": "Not Found"}, 404)

    def do_DELETE(self):
        if context := self.context(self.path.removeprefix("/contexts/")):
            del CONTEXTS[context.id]
            self.answer({})

    def do_POST(self):
        asked = self.asked()
        if self.path == "/execute":
            if context := self.context(asked.get("context_id") or MAIN.id):
                self.execute(context, asked)
        elif self.path == "/contexts":
            context = Context(asked.get("cwd") or MAIN.cwd)
            CONTEXTS[context.id] = context
            self.answer(context.shown())
        elif context := self.context(self.path.removeprefix("/contexts/").removesuffix("/restart")):
            context.restart()
            self.answer({})

    def execute(self, context, asked):
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

        def send(data):
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
            self.wfile.flush()

        def say(line):
            send(json.dumps(line).encode() + b"\n")

        with context.running:
            context.count += 1
            os.environ.update(asked.get("env_vars") or {})
            os.chdir(context.cwd)
            try:
                run(context, asked["code"], say)
            except Exception as error:
                told = "".join(traceback.format_exception(error))
                say({"type": "error", "name": type(error).__name__, "value": str(error), "traceback": told})
            say({"type": "number_of_executions", "execution_count": context.count})
        send(b"")


ThreadingHTTPServer(("127.0.0.1" if len(sys.argv) < 2 else sys.argv[1], PORT), Handler).serve_forever()
