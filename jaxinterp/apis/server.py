"""A vision service over HTTP in front of any `VisionAPI`: the reference for clients and for experiments.

    POST /labels, POST /text    a picture in the body -> the answers of `jaxinterp.apis.protocol`
    GET /                       {"service": ..., "labels": true, "text": true or false, ...}

Every bad request has an answer that says what was wrong: 400 (no picture, damaged, cut short), 401 (no key, or another
one), 404, 405, 408 (sent too slowly), 411 (no length), 413 (too large), 415 (not a picture's type), 500 (the network
failed), 501 (no OCR engine), 503 (busy). It is meant for one machine or a network of friends: there is no encryption.
"""

from __future__ import annotations

import contextlib
import hmac
import io
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from jaxinterp.apis.protocol import ServiceError, VisionAPI
from jaxinterp.data.decode import decode_pixels, stored_size
from jaxinterp.data.source import DamagedImage

_TYPES = ("application/octet-stream", "image/")
_DRAINED, _DRAINING = 2**18, 1.0  # bytes of a refused request that are read, and seconds that this may take


class _Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})


class _Timely(io.RawIOBase):
    """What a connection receives until a deadline, however little at a time."""

    def __init__(self, connection: socket.socket, patience: float | int):
        self.connection, self.patience = connection, patience
        self.begin()

    def begin(self) -> None:
        """Sets the deadline anew."""
        self.end = time.monotonic() + self.patience

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Raises _Refused at the deadline."""
        left = self.end - time.monotonic()
        if left > 0:
            self.connection.settimeout(left)
            with contextlib.suppress(TimeoutError):
                return self.connection.recv_into(buffer)
        raise _Refused(408, f"the request did not arrive within {self.patience:g} seconds")


class Server(ThreadingHTTPServer):
    """A service that `serve_forever` runs; a context manager, whose end frees the port."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self,
        api: VisionAPI,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        about: Mapping[str, Any] | None = None,
        key_variable: str | None = None,
        timeout: float | int = 30.0,
        max_bytes: int = 16 * 2**20,
        max_pixels: int = 16 * 2**20,
        connections: int = 16,
        say: Callable[[str], object] | None = None,
    ):
        """Takes the port; nothing is answered yet.

        Args:
            api: what answers.
            host: address to listen on; the default is reached from this machine only.
            port: 0 means any that is free, see `url`.
            about: what GET / tells beside "labels" and "text", which are true unless it says otherwise.
            key_variable: name of the environment variable with the key that requests must bring as a bearer token;
                None means that anyone is served.
            timeout: seconds that a client may take to send a request, from its first byte to its last, or to read an
                answer, and that a connection may be idle.
            max_bytes: of a picture's file.
            max_pixels: of a picture.
            connections: at once; the next one is told to come again.
            say: is told of every answer, in a line without headers; None means nobody.

        Raises:
            ValueError: a port or a limit out of range, or a key that is not set.
            OSError: the port is taken, or the address is not this machine's.
        """
        if not 0 <= port <= 65535:
            raise ValueError(f"port must be from 0 to 65535, got {port}")
        for name, value in (("timeout", timeout), ("max_bytes", max_bytes), ("max_pixels", max_pixels)):
            if not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if connections < 1:
            raise ValueError(f"connections must be at least 1, got {connections}")
        if key_variable is not None and not os.environ.get(key_variable):
            raise ValueError(f"the environment variable {key_variable!r}, which is to hold the key, is not set")
        self.api, self.key_variable, self.say = api, key_variable, say
        self.patience, self.max_bytes, self.max_pixels = timeout, max_bytes, max_pixels
        self.about = {"service": "jaxinterp", "labels": True, "text": True, **(about or {})}
        self._free = threading.BoundedSemaphore(connections)
        super().__init__((host, port), _Handler)

    @property
    def url(self) -> str:
        """Where it is reached."""
        host, port = self.server_address[:2]
        return f"http://{host if isinstance(host, str) else host.decode()}:{port}"

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for the connection, if one is free."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        body = json.dumps({"error": "too many connections at once"}).encode()
        head = f"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: {len(body)}\r\n"
        try:
            request.settimeout(1.0)
            request.sendall(f"{head}Content-Type: application/json\r\nConnection: close\r\n\r\n".encode() + body)
        except OSError:
            pass
        finally:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """One connection, whose place is free afterwards."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is nobody's error."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "jaxinterp", ""
    server: Server

    def setup(self) -> None:
        super().setup()
        self.received = _Timely(self.connection, self.server.patience)
        self.rfile = io.BufferedReader(self.received)

    def handle_one_request(self) -> None:
        """The deadline of a request begins with its first byte."""
        self.requestline, self.command = "", ""
        self.received.begin()
        try:
            self.rfile.peek(1)  # type: ignore[attr-defined]  # it is buffered
        except _Refused:  # nothing was asked
            self.close_connection = True
            return
        self.received.begin()
        try:
            super().handle_one_request()
        except _Refused as error:  # in the headers
            self.send_error(error.status, str(error))

    def do_GET(self) -> None:
        # A body, which nothing here takes, would be read as the next request.
        self.close_connection |= self.headers.get("Content-Length", "0").strip() != "0"
        self.close_connection |= "Transfer-Encoding" in self.headers
        self._answered(self._about)

    def do_POST(self) -> None:
        self._answered(self._post)

    def _about(self) -> dict[str, Any]:
        self._check_key()
        if self.path != "/":
            raise self._unknown()
        return dict(self.server.about)

    def _post(self) -> dict[str, Any]:
        self._check_key()
        if self.path not in ("/labels", "/text"):
            raise self._unknown()
        picture = self._picture(self._body())
        if self.path == "/text":
            return {"text": list(self.server.api.text(picture))}
        return {"labels": [label._asdict() for label in self.server.api.labels(picture)]}

    def _unknown(self) -> _Refused:
        if self.path in ("/", "/labels", "/text"):
            allowed = "GET" if self.path == "/" else "POST"
            return _Refused(405, f"{self.path} takes {allowed} only", {"Allow": allowed})
        return _Refused(404, "there are POST /labels, POST /text and GET /, and nothing else")

    def _check_key(self) -> None:
        if self.server.key_variable is None:
            return
        key = os.environ.get(self.server.key_variable, "")
        wanted, given = f"Bearer {key}", self.headers.get("Authorization", "")
        if not key or not hmac.compare_digest(given.encode("utf-8", "replace"), wanted.encode("utf-8", "replace")):
            raise _Refused(401, "a key is needed, as Authorization: Bearer KEY", {"WWW-Authenticate": "Bearer"})

    def _body(self) -> bytes:
        kind = self.headers.get("Content-Type", "application/octet-stream").strip().lower()
        if not kind.startswith(_TYPES):
            raise _Refused(415, "the body must be a picture, such as image/png")
        length = self.headers.get("Content-Length")
        if length is None:
            raise _Refused(411, "the length of the body is needed (Content-Length)")
        if not (length.isascii() and length.isdigit()) or len(length) > 18:
            raise _Refused(400, "Content-Length is not a number")
        if int(length) > self.server.max_bytes:
            raise _Refused(413, f"the picture's file is larger than {self.server.max_bytes} bytes")
        if not int(length):
            raise _Refused(400, "the body is empty, where a picture was expected")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise _Refused(400, f"the body was cut short at {len(body)} of {int(length)} bytes")
        return body

    def _picture(self, body: bytes) -> Any:
        try:
            width, height = stored_size(body)
            if width * height > self.server.max_pixels:
                raise _Refused(413, f"{width} x {height} is more than {self.server.max_pixels} pixels")
            return decode_pixels(body)
        except DamagedImage as error:
            raise _Refused(400, f"the picture could not be read: {error.reason}") from None

    def _answered(self, answer: Callable[[], dict[str, Any]]) -> None:
        """Sends the answer, or the error that it ends in."""
        status, headers = 200, {}
        try:
            body = answer()
        except _Refused as error:
            status, headers, body = error.status, error.headers, {"error": str(error)}
            self.close_connection = True
        except ServiceError as error:
            status, body = error.status or 500, {"error": str(error)}
        except (ValueError, TypeError) as error:  # a picture that cannot be cropped
            status, body = 400, {"error": str(error)}
        except Exception as error:
            print(f"jaxinterp: error: {type(error).__name__}: {error}", file=sys.stderr)
            status, body = 500, {"error": "the service failed"}
        self._send(status, body, headers)

    def _send(self, status: int, body: dict[str, Any], headers: Mapping[str, str]) -> None:
        content = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        self.connection.settimeout(self.server.patience)
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        if self.close_connection:
            self._end()

    def _end(self) -> None:
        """Ends the connection, but first reads what little may be left of a refused request.

        A connection that is closed with something unread is reset, which may take the answer away from its reader.
        """
        with contextlib.suppress(OSError, _Refused):
            self.connection.shutdown(socket.SHUT_WR)
            rest, left = _Timely(self.connection, _DRAINING), _DRAINED
            while left > 0 and (part := rest.read(left)):
                left -= len(part)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the standard library refuses (a malformed request, an unknown method), in the same form."""
        self.close_connection = True
        self.command = self.command or "GET"
        self.request_version = "HTTP/1.1"
        code, headers = (405, {"Allow": "GET, POST"}) if code == 501 else (code, {})
        with contextlib.suppress(OSError):
            self._send(code, {"error": message or HTTPStatus(code).phrase}, headers)

    def log_message(self, format: str, *args: Any) -> None:
        if self.server.say is not None:
            line = re.sub(r"\?\S*", "?...", format % args)  # what follows may hold a key
            line = line.encode("ascii", "backslashreplace").decode()
            self.server.say(f"{self.client_address[0]} {line[:200]}")
