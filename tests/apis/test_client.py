"""The client against servers that are slow, busy, broken or hostile."""

import contextlib
import datetime
import email.utils
import io
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from jaxinterp.apis import BadAnswer, HTTPVision, Label, ServiceError, VisionAPI

GOOD = json.dumps({"labels": [{"name": "cat", "score": 0.25}, {"name": "dog", "score": 0.5}]})
IMAGE = np.linspace(0, 1, 6 * 5 * 3, dtype=np.float32).reshape(6, 5, 3)
KEY = "sesame-4711"


# Servers, on this machine, that do to a client whatever a test says


class Hostile(ThreadingHTTPServer):
    """Answers request i with `script[i]`, the last for all that follow; keeps what it was asked."""

    daemon_threads = True

    def __init__(self, script: list[Callable]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script = script
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.over = threading.Event()  # for those that never answer

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        """Clients go away; that is the point."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hostile

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, dict(self.headers), body))
        self.close_connection = True
        act = self.server.script[min(len(self.server.requests), len(self.server.script)) - 1]
        with contextlib.suppress(ConnectionError, TimeoutError):
            act(self)

    def log_message(self, format, *args):
        pass


@contextlib.contextmanager
def hostile(*script: Callable) -> Iterator[Hostile]:
    """The server, running."""
    server = Hostile(list(script))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
        thread.join()


def answer(body: bytes | str, status: int = 200, **headers: str) -> Callable:
    """A whole answer."""
    content = body.encode() if isinstance(body, str) else body

    def act(handler):
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(content)), "Connection": "close", **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(content)

    return act


def silent(handler) -> None:
    """Says nothing until the test is over."""
    handler.server.over.wait(60)


def dripping(handler) -> None:
    """A byte of the body now and then, without end."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    while not handler.server.over.wait(0.03):
        handler.wfile.write(b" ")


def dripping_headers(handler) -> None:
    """A byte of the headers now and then, without end."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    while not handler.server.over.wait(0.03):
        handler.wfile.write(b"a")


def truncated(handler) -> None:
    """Half of what it promises."""
    answer('{"labels": [', Content_Length="100")(handler)


def endless(handler) -> None:
    """A body without a length that does not end."""
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    chunk = b" " * 4096
    while not handler.server.over.is_set():
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))


def not_http(handler) -> None:
    """Something else."""
    handler.wfile.write(b"220 smtp.example ESMTP\r\n")


def closed_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


# The client


def client(url, **settings):
    """A client whose pauses take no time but are written down."""
    pauses = []
    made = HTTPVision(url, **{"retries": 2, "timeout": 3.0, "sleep": pauses.append, **settings})
    return made, pauses


def test_labels_and_text_and_the_picture_as_it_is():
    read = json.dumps({"text": ["two words", "größe"]})
    with hostile(answer(GOOD), answer(read)) as server:
        api, pauses = client(server.url + "/")
        assert isinstance(api, VisionAPI)
        with api:
            assert api.labels(IMAGE) == (Label("dog", 0.5), Label("cat", 0.25))
            assert api.text(IMAGE) == ("two words", "größe")
        (first, headers, body), (second, _, _) = server.requests
    assert (first, second) == ("/labels", "/text")
    assert headers["Content-Type"] == "image/png"
    assert "Authorization" not in headers
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(body))), np.rint(IMAGE * 255).astype(np.uint8))
    assert pauses == []


def test_a_closed_client_begins_anew():
    with hostile(answer(GOOD)) as server:
        api, _ = client(server.url)
        for _ in range(2):
            assert len(api.labels(IMAGE)) == 2
            api.close()
        api.close()


def test_closing_ends_the_requests_of_other_threads():
    with hostile(silent) as server:
        api, _ = client(server.url, timeout=60)
        found = []

        def ask():
            with pytest.raises(ServiceError, match="the client was closed before the answer came"):
                api.labels(IMAGE)
            found.append(True)

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        end = time.monotonic() + 10
        while not server.requests and time.monotonic() < end:
            time.sleep(0.01)
        api.close()
        asking.join(10)
        assert found


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(status):
    with hostile(answer("", status), answer("", status), answer(GOOD)) as server:
        api, pauses = client(server.url, backoff=0.5)
        with api:
            assert len(api.labels(IMAGE)) == 2
    assert len(pauses) == 2
    assert 0.25 <= pauses[0] <= 0.5
    assert 0.5 <= pauses[1] <= 1.0


def test_pauses_double_and_differ():
    with hostile(answer('{"error": "full"}', 503)) as server:
        api, pauses = client(server.url, retries=9, backoff=1.0)
        with api, pytest.raises(ServiceError, match="answered 503: full; given up after 10 tries") as error:
            api.labels(IMAGE)
        assert len(server.requests) == 10
    assert error.value.status == 503
    bounds = np.minimum(2.0 ** np.arange(9), 30)
    assert (np.array(pauses) >= bounds / 2).all()
    assert (np.array(pauses) <= bounds).all()
    assert len({pause / bound for pause, bound in zip(pauses, bounds, strict=True)}) > 5


def test_a_busy_service_decides_when_to_come_again():
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=20)
    date = email.utils.format_datetime(later, usegmt=True)
    script = [answer("", 429, Retry_After=value) for value in ("7", date, "soon", "-3", "0.5")]
    with hostile(*script, answer(GOOD)) as server:
        api, pauses = client(server.url, retries=5, backoff=0.01)
        with api:
            assert len(api.labels(IMAGE)) == 2
    assert pauses[0] == 7
    assert 15 < pauses[1] <= 20
    assert max(pauses[2:]) < 1


@pytest.mark.parametrize(
    ("asked", "seconds"), [("3600", "3600"), ("120.5", "120"), ("9" * 10, "9" * 10), ("9" * 5000, "inf")]
)
def test_a_service_that_asks_for_too_long_is_left(asked, seconds):
    with hostile(answer("", 429, Retry_After=asked)) as server:
        api, pauses = client(server.url, patience=60)
        with api, pytest.raises(ServiceError, match=f"429 and asks to wait {seconds} seconds, more than the 60 of pat"):
            api.labels(IMAGE)
        assert len(server.requests) == 1
    assert pauses == []


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 415, 501])
def test_a_refusal_is_not_repeated_and_quoted_on_one_line(status):
    with hostile(answer(json.dumps({"error": "no\nsuch\x1b[31m " + "thing " * 200}), status)) as server:
        api, _ = client(server.url)
        with api, pytest.raises(ServiceError, match=f"answered {status}: no such") as error:
            api.labels(IMAGE)
        assert len(server.requests) == 1
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 300


def test_redirects_are_not_followed():
    with hostile(answer(GOOD)) as other, hostile(answer("", 307, Location=other.url + "/labels")) as server:
        api, _ = client(server.url)
        with api, pytest.raises(ServiceError, match="answered 307, and is not followed there"):
            api.labels(IMAGE)
        assert not other.requests


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (silent, "did not answer within 0.3 seconds; given up after 2 tries"),
        (dripping, "did not answer within 0.3 seconds"),
        (dripping_headers, "did not answer within 0.3 seconds"),
        (truncated, "broke off"),
        (not_http, "broke off"),
    ],
)
def test_slow_and_broken_services_end_in_an_error(act, message):
    with hostile(act) as server:
        api, pauses = client(server.url, timeout=0.3, retries=1)
        begun = time.monotonic()
        with api, pytest.raises(ServiceError, match=message):
            api.labels(IMAGE)
        assert time.monotonic() - begun < 20  # on a busy machine; without a deadline it would be a minute
        assert len(server.requests) == 2
    assert len(pauses) == 1


def test_a_service_that_is_down():
    api, pauses = client(f"http://127.0.0.1:{closed_port()}")
    with api, pytest.raises(ServiceError, match="cannot be reached; given up after 3 tries"):
        api.text(IMAGE)
    assert len(pauses) == 2


def test_an_answer_cut_short_may_pass():
    with hostile(truncated, answer(GOOD)) as server:
        api, _ = client(server.url)
        with api:
            assert len(api.labels(IMAGE)) == 2


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", r"not JSON \(0 bytes\)"),
        (b"<html>502 Bad Gateway</html>", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"labels": [{"name": "a", "score": NaN}]}', "not JSON"),
        (b'{"labels": [{"name": "a", "score": 1e999}]}', "not a finite number"),
        (b'{"labels": [{"name": "a", "score": 1' + b"0" * 400 + b"}]}", "not a finite number"),
        (b'{"labels": [{"name": "a", "score": 1' + b"0" * 9000 + b"}]}", "not JSON"),
        (b'{"labels": [{"name": "a", "score": true}]}', "not a finite number"),
        (b'{"labels": [{"name": "a", "score": "0.5"}]}', "not a finite number"),
        (b'{"labels": [{"name": 3, "score": 0.5}]}', "expected a name and a score"),
        (b'{"labels": [{"name": "", "score": 0.5}]}', "expected a name and a score"),
        (b'{"labels": ["cat"]}', "expected a name and a score"),
        (b'{"labels": {"cat": 1}}', 'not an object with a list "labels"'),
        (b'{"text": []}', 'not an object with a list "labels"'),
        (b"[]", 'not an object with a list "labels"'),
        (b'{"labels": [' + b"0," * 10_000 + b"0]}", "10001 labels, more than 10000"),
    ],
)
def test_garbage_is_refused_and_not_asked_for_again(body, message):
    with hostile(answer(body)) as server:
        api, _ = client(server.url)
        with api, pytest.raises(BadAnswer, match=message) as error:
            api.labels(IMAGE)
        assert len(server.requests) == 1
    assert server.url in str(error.value)


def test_text_that_is_no_text():
    with hostile(answer('{"text": ["a", 3]}'), answer(json.dumps({"text": ["a" * 10_001]}))) as server:
        api, _ = client(server.url)
        with api:
            for _ in range(2):
                with pytest.raises(BadAnswer, match="expected strings"):
                    api.text(IMAGE)


def test_large_and_packed_answers_are_not_read():
    with hostile(endless, answer(b" " * 5000), answer(GOOD, Content_Encoding="gzip")) as server:
        api, _ = client(server.url, max_bytes=4999)
        with api:
            for _ in range(2):
                with pytest.raises(BadAnswer, match="longer than 4999 bytes"):
                    api.labels(IMAGE)
            with pytest.raises(BadAnswer, match="packed, which was not asked for"):
                api.labels(IMAGE)


def test_requests_keep_to_the_rate():
    with hostile(answer("", 503), answer(GOOD)) as server:
        api, pauses = client(server.url, rate=0.01, backoff=0.0)
        with api:
            api.labels(IMAGE)  # two requests
            api.labels(IMAGE)
    waits = [pause for pause in pauses if pause]
    np.testing.assert_allclose(waits, [100, 200], atol=5)


# The key


def test_the_key_is_sent_and_nowhere_else(monkeypatch, caplog):
    monkeypatch.setenv("VISION_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    echo = json.dumps({"error": f"who is {KEY}?"})
    script = [answer(GOOD), answer(echo, 403), answer(" " * 790 + f"{KEY} " + " " * 300, 500), truncated, silent]
    with hostile(*script) as server:
        api, _ = client(server.url, key_variable="VISION_KEY", retries=0, timeout=0.3)
        with api:
            assert len(api.labels(IMAGE)) == 2
            assert server.requests[0][1]["Authorization"] == f"Bearer {KEY}"
            for message in (r"who is \*\*\*\?", r"500: \*\*\*", "broke off", "did not answer"):
                with pytest.raises(ServiceError, match=message) as error:
                    api.labels(IMAGE)
                chain, seen = error.value, []
                while chain is not None:
                    seen.append(f"{chain!r} {chain}")
                    chain = chain.__cause__ if chain.__suppress_context__ else chain.__context__
                assert KEY not in " ".join(seen)
        assert KEY not in repr(api)
        assert KEY not in repr(vars(api))
    assert caplog.records
    assert KEY not in caplog.text


def test_keys_that_cannot_be_sent(monkeypatch):
    with pytest.raises(ValueError, match="'NO_KEY_HERE', which is to hold the key, is not set"):
        HTTPVision("http://localhost:1", key_variable="NO_KEY_HERE")
    monkeypatch.setenv("VISION_KEY", f"{KEY}\r\nX: y")
    with pytest.raises(ValueError, match="'VISION_KEY' holds characters") as error:
        HTTPVision("http://localhost:1", key_variable="VISION_KEY")
    assert KEY not in str(error.value)
    monkeypatch.setenv("VISION_KEY", KEY)
    with pytest.raises(ValueError, match="must be https where a key is sent, got http to vision"):
        HTTPVision("http://vision.example", key_variable="VISION_KEY")
    HTTPVision("https://vision.example", key_variable="VISION_KEY")
    HTTPVision("http://[::1]:80", key_variable="VISION_KEY")


@pytest.mark.parametrize(
    ("url", "settings", "message"),
    [
        ("ftp://host", {}, "must be http://HOST:PORT or https://HOST, got 'ftp://host'"),
        ("localhost:80", {}, "must be http://HOST:PORT"),
        ("http://host:many", {}, "must be http://HOST:PORT"),
        ("http://host/?key=1", {}, "must not hold a query or a fragment"),
        ("http://me:secret@host", {}, "must not hold a name or a password"),
        ("http://host", {"timeout": 0}, "timeout must be above 0"),
        ("http://host", {"backoff": -1}, "backoff and patience must be at least 0"),
        ("http://host", {"retries": -1}, "retries must be at least 0"),
        ("http://host", {"rate": 0}, "rate must be above 0"),
    ],
)
def test_bad_settings(url, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        HTTPVision(url, **settings)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("image", "kind", "message"),
    [
        (np.zeros((4, 4)), ValueError, r"must be \[H,W,3\], got shape \(4, 4\)"),
        (np.zeros((0, 4, 3)), ValueError, r"must be \[H,W,3\]"),
        (np.full((4, 4, 3), 1.5), ValueError, "finite and in"),
        (np.full((4, 4, 3), np.nan), ValueError, "finite and in"),
        (np.zeros((4, 4, 3), int), TypeError, "floats in .* or uint8, got int64"),
    ],
)
def test_what_is_no_image_is_not_sent(image, kind, message):
    api, _ = client(f"http://127.0.0.1:{closed_port()}")
    with pytest.raises(kind, match=message):
        api.labels(image)
