"""What the rows have in common, and requests of our own beside those of the SDK."""

import json
import os
import time
import urllib.error
import urllib.request

API = os.environ["E2B_API_URL"]
KEY = os.environ["E2B_API_KEY"]
RUN = os.environ["ICEBOX_SDK_RUN"]
ODD = {"run": RUN, "odd key & more": "a=b&c d%20+ü"}

ROWS = []


def row(function):
    ROWS.append(function)
    return function


def ask(method, url, headers=None, body=None):
    """Status, headers and body of a request of our own."""
    request = urllib.request.Request(url, method=method, headers=headers or {}, data=body)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def api(method, path, body=None):
    headers = {"X-API-KEY": KEY, "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    status, headers, text = ask(method, API + path, headers, data)
    return status, headers, json.loads(text) if text else None


def raises(kind, call, *words):
    try:
        call()
    except kind as error:
        for word in words:
            assert word in str(error), f"{error!r} does not say {word!r}"
        return error
    raise AssertionError(f"{kind} was not raised")


def until(what, condition, seconds=120):
    """Waits for what happens outside of this program, where nobody tells it."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.1)
    return found


def paused(box, **options):
    pause = getattr(box, "pause", None) or box.beta_pause
    return pause(**options)
