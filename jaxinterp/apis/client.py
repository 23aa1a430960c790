"""A vision service over HTTP that may be slow, busy, broken or hostile.

Every request has one deadline for all of it, so that a service which sends a byte now and then does not hold the client
for ever. Answers are read up to a limit and never unpacked. What may pass is tried again, after times that double with
jitter, or that the service asks for (Retry-After). The key is read from the environment for each request; it stands in
no attribute, message or log.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import email.utils
import ipaddress
import json
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from jaxinterp.apis.protocol import BadAnswer, Label, ServiceError, read_labels, read_text, to_png

_RETRIED = (408, 425, 429, 500, 502, 503, 504)
_LONGEST_PAUSE = 30.0  # seconds between two tries, unless the service asks for more
_QUOTED = 200  # characters of a service's own words in a message


class _Passing(Exception):
    """A failure that may pass."""


class HTTPVision:
    """A service that speaks the format of `jaxinterp.apis.protocol`. Threads may share one.

    It is a context manager; `close` frees its connection and its thread.
    """

    def __init__(
        self,
        url: str,
        *,
        key_variable: str | None = None,
        timeout: float | int = 30.0,
        retries: int = 4,
        backoff: float | int = 0.5,
        patience: float | int = 60.0,
        rate: float | int | None = None,
        max_bytes: int = 2**20,
        sleep: Callable[[float], object] = time.sleep,
    ):
        """Nothing is sent yet.

        Args:
            url: http://HOST:PORT or https://HOST, with a path where the service has one.
            key_variable: name of the environment variable that holds the key, which is sent as a bearer token; None
                means that none is sent.
            timeout: seconds that a request may take, from connecting to the last byte.
            retries: how often a request is tried again after a failure that may pass: no connection, a time-out, an
                answer cut short, status 408, 425, 429, 500, 502, 503 or 504.
            backoff: seconds before the first of these, at most; doubled for each, of which half to all is waited.
            patience: the longest Retry-After, in seconds, that is waited for.
            rate: requests a second, at most; None means as fast as answers come.
            max_bytes: of an answer.
            sleep: waits so many seconds.

        Raises:
            ValueError: not such a URL, one with a name and a password in it, a number out of range, a key without
                encryption to another machine, or no key in the environment.
        """
        import httpx

        if not timeout > 0:
            raise ValueError(f"timeout must be above 0 seconds, got {timeout}")
        if not (backoff >= 0 and patience >= 0):
            raise ValueError(f"backoff and patience must be at least 0 seconds, got {backoff} and {patience}")
        if retries < 0 or max_bytes < 1:
            raise ValueError(f"retries must be at least 0 and max_bytes at least 1, got {retries} and {max_bytes}")
        if rate is not None and not rate > 0:
            raise ValueError(f"rate must be above 0 requests a second, got {rate}")
        try:
            parsed = httpx.URL(url)
        except (httpx.InvalidURL, TypeError):
            raise ValueError("url must be http://HOST:PORT or https://HOST, got another form") from None
        if parsed.userinfo:  # not shown
            raise ValueError("url must not hold a name or a password; the key comes from the environment")
        if parsed.query or parsed.fragment:  # not shown either: that is where some services want their key
            raise ValueError("url must not hold a query or a fragment; the key comes from the environment")
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError(f"url must be http://HOST:PORT or https://HOST, got {str(url)[:_QUOTED]!r}")
        here = _is_this_machine(parsed.host)
        if key_variable is not None:
            _key(key_variable)
            if parsed.scheme == "http" and not here:
                raise ValueError(f"url must be https where a key is sent, got http to {parsed.host}")
        self.url = str(parsed).rstrip("/")
        self.key_variable, self.timeout, self.retries, self.backoff = key_variable, timeout, retries, backoff
        self.patience, self.rate, self.max_bytes = patience, rate, max_bytes
        self._proxies, self._sleep, self._jitter = not here, sleep, random.Random()
        self._turn, self._next = threading.Lock(), 0.0
        self._starting = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._http: Any = None

    def labels(self, image: Any) -> tuple[Label, ...]:
        """What the service sees in the image [H,W,3], the most likely first; see `VisionAPI`.

        Raises:
            ServiceError: no answer after all tries, or a refusal; BadAnswer where the answer makes no sense.
            ValueError, TypeError: not an image.
        """
        return self._asked("labels", to_png(image), read_labels)

    def text(self, image: Any) -> tuple[str, ...]:
        """What the service reads in the image [H,W,3]. Errors are those of `labels`."""
        return self._asked("text", to_png(image), read_text)

    def close(self) -> None:
        """Ends the connection and the thread, and requests of other threads; the next one would begin anew."""
        with self._starting:
            loop, http, self._loop, self._http = self._loop, self._http, None, None
        if loop is not None:
            asyncio.run_coroutine_threadsafe(_ended(http), loop).result()
            loop.call_soon_threadsafe(loop.stop)

    def __enter__(self) -> HTTPVision:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"HTTPVision({self.url!r})"

    def _asked(self, what: str, body: bytes, read: Callable[[bytes], Any]) -> Any:
        where, status, reason = f"{self.url}/{what}", None, ""
        for attempt in range(self.retries + 1):
            self._wait_for_turn()
            asked = None
            try:
                status, headers, answer = self._exchanged(where, body)
            except _Passing as error:
                status, reason = None, str(error)
            else:
                if status == 200:
                    try:
                        return read(answer)
                    except BadAnswer as error:
                        raise BadAnswer(f"{where}: {error}", status) from None
                reason = f"answered {status}{self._words(answer)}"
                if status not in _RETRIED:
                    moved = ", and is not followed there" if 300 <= status < 400 else ""
                    raise ServiceError(f"{where} {reason}{moved}", status)
                asked = _retry_after(headers.get("retry-after"))
            if asked is not None and asked > self.patience:
                wait = f"asks to wait {asked:.0f} seconds, more than the {self.patience:g} of patience"
                raise ServiceError(f"{where} {reason} and {wait}", status)
            if attempt < self.retries:
                pause = min(self.backoff * 2**attempt, _LONGEST_PAUSE) * (0.5 + 0.5 * self._jitter.random())
                self._sleep(max(pause, asked or 0.0))
        tries = f"{self.retries + 1} tries" if self.retries else "one try"
        raise ServiceError(f"{where} {reason}; given up after {tries}", status)

    def _wait_for_turn(self) -> None:
        """Until a request may start; each takes the next place in the line."""
        if self.rate is None:
            return
        with self._turn:
            now = time.monotonic()
            start = max(now, self._next)
            self._next = start + 1 / self.rate
        if start > now:
            self._sleep(start - now)

    def _exchanged(self, where: str, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and body of one answer; _Passing where there is none."""
        import httpx

        exchange = self._begun(where, body)
        try:
            return exchange.result()
        except concurrent.futures.CancelledError:
            raise ServiceError(f"{where}: the client was closed before the answer came") from None
        except (TimeoutError, httpx.TimeoutException):
            raise _Passing(f"did not answer within {self.timeout:g} seconds") from None
        except httpx.ConnectError:
            raise _Passing("cannot be reached") from None
        except httpx.HTTPError as error:  # its words may hold what was sent
            raise _Passing(f"broke off ({type(error).__name__})") from None
        except BaseException:
            exchange.cancel()
            raise

    async def _exchange(self, http: Any, where: str, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
        headers = {"Content-Type": "image/png", "Accept": "application/json", "Accept-Encoding": "identity"}
        if self.key_variable is not None:
            headers["Authorization"] = f"Bearer {_key(self.key_variable)}"
        async with (
            asyncio.timeout(self.timeout),
            http.stream("POST", where, content=body, headers=headers) as response,
        ):
            packed = response.headers.get("content-encoding", "identity")
            if packed.strip().lower() not in ("", "identity"):
                raise BadAnswer(f"{where}: the answer is packed, which was not asked for", response.status_code)
            answer = bytearray()
            async for chunk in response.aiter_raw():
                answer += chunk
                if len(answer) > self.max_bytes:
                    raise BadAnswer(f"{where}: the answer is longer than {self.max_bytes} bytes", response.status_code)
            return response.status_code, response.headers, bytes(answer)

    def _begun(self, where: str, body: bytes) -> concurrent.futures.Future[Any]:
        """An exchange in a loop that has a thread of its own: only there can one be ended at its deadline."""
        import httpx

        with self._starting:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._http = httpx.AsyncClient(timeout=self.timeout, follow_redirects=False, trust_env=self._proxies)
                threading.Thread(target=_serve, args=(self._loop,), name="jaxinterp-http", daemon=True).start()
            return asyncio.run_coroutine_threadsafe(self._exchange(self._http, where, body), self._loop)

    def _words(self, answer: bytes) -> str:
        """What the service says about its status, shortened, on one line and without the key."""
        text = answer.decode("utf-8", "replace")
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            text = str(json.loads(text)["error"])
        if self.key_variable is not None:
            text = text.replace(_key(self.key_variable), "***")
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return f": {text[:_QUOTED]}" if text else ""


async def _ended(http: Any) -> None:
    """Ends all requests and the connection; without it those who wait for an answer would wait for ever."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await http.aclose()


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


def _key(variable: str) -> str:
    """The key in an environment variable; ValueError names the variable only."""
    key = os.environ.get(variable, "")
    if not key:
        raise ValueError(f"the environment variable {variable[:_QUOTED]!r}, which is to hold the key, is not set")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ValueError(f"the environment variable {variable[:_QUOTED]!r} holds characters that no key has")
    return key


def _retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, given as a number or as a date; None where it makes no sense."""
    if value is None:
        return None
    value = value.strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", value):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
