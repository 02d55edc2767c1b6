"""Ask a server over HTTP until it answers: kept connections, retries with backoff, and errors that say why.

A server may be restarted, overloaded or behind a proxy that cuts answers off. Generating the same response again has no
side effect, so that every failed request is sent again: after a connection error, a timeout, the statuses 408, 429 and
5xx, and after an answer that cannot be read.
"""

import contextlib
import http.client
import json
import random
import socket
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

T = TypeVar("T")
Connection = http.client.HTTPConnection
RETRIED = {408, 425, 429}  # and 5xx, except 501, which says that the server will never do this
LONGEST_PAUSE = 30.0  # seconds between two tries, if the server does not ask for more


class ServerError(RuntimeError):
    """The server cannot be used, or did not answer for too long."""


class Refused(ServerError):
    """The server refused a request with an HTTP status that sending it again would not change."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class UnreadableAnswer(Exception):
    """An answer lacks what was asked for. The request is sent again."""


class _Failed(Exception):
    """A try that failed: how long the server asks to wait, and how long it kept silent before, in seconds."""

    def __init__(self, message: str, pause: float = 0.0, silent: float = 0.0):
        super().__init__(message)
        self.pause, self.silent = pause, silent


class Retries(NamedTuple):
    """When a request is given up.

    Args:
        timeout: seconds without a byte after which a try has failed.
        retries: how often a request is sent again at least, and how often after an unreadable answer at most.
        patience: seconds of waiting, between tries and for tries without an answer, before a server counts as lost.
    """

    timeout: float = 600.0
    retries: int = 3
    patience: float = 300.0


class HttpClient:
    """Send JSON to a server and read JSON, from any number of threads.

    Args:
        url: the base of all addresses, such as http://127.0.0.1:8080/v1.
        key: the API key, or None. It appears in no error.
        limits: when a request is given up.
        sleep: waits between two tries.

    Raises:
        ValueError: the URL has no scheme http or https, or contains a password; or no header can have the key.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        limits: Retries | None = None,
        sleep: Callable[[float], object] | None = None,
    ):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not the address of a server, such as http://127.0.0.1:8080/v1")
        if parts.username or parts.password or parts.query:
            raise ValueError(f"the address of {parts.hostname} contains a password or a query: give the key separately")
        if key and not (key.isascii() and key.isprintable()):
            raise ValueError("the API key contains a line break or another character that no HTTP header can have")
        self.url, self._parts, self._key, self._limits = url.rstrip("/"), parts, key, limits or Retries()
        self._cancelled = threading.Event()
        self._sleep, self._random = sleep or self._cancelled.wait, random.Random()
        self._lock, self._idle, self._busy = threading.Lock(), list[Connection](), set[Connection]()

    def ask(self, path: str, body: dict[str, Any] | None, read: Callable[[Any], T], as_text: bool = False) -> T:
        """Return what `read` makes of the answer: POST if there is a body, else GET.

        Args:
            path: the path after the base, or, if it begins with two slashes, after the base without its final /v1.
            body: the JSON that is sent.
            read: reads the answer's JSON, and raises UnreadableAnswer if it lacks something.
            as_text: the answer is no JSON, and `read` gets its text.

        Raises:
            ServerError: the server refused the request, which is raised at once, or failed for too long.
        """
        tries, unreadable, waited, limits = 0, 0, 0.0, self._limits
        while not self._cancelled.is_set():
            pause, tries = 0.0, tries + 1
            try:
                return read(self._try(path, body, as_text))
            except UnreadableAnswer as problem:
                reason, unreadable = f"its answer cannot be used: {self._without_key(str(problem))}", unreadable + 1
            except _Failed as problem:
                reason, pause, waited = str(problem), problem.pause, waited + problem.silent
            lost = tries > limits.retries and waited >= limits.patience
            too_long = pause > max(limits.patience - waited, LONGEST_PAUSE)
            if lost or too_long or unreadable > limits.retries:
                asked = f". It asks to wait {pause:.0f} s" if pause else ""
                raise ServerError(f"{self.url} failed {tries} times in a row, the last time with {reason}{asked}")
            backoff = min(LONGEST_PAUSE, 0.5 * 2 ** min(tries - 1, 10)) * self._random.uniform(0.5, 1.0)
            waited += max(backoff, pause)
            self._sleep(max(backoff, pause))
        raise ServerError(f"{self.url} is no longer asked, because another request failed")

    def cancel(self) -> None:
        """Make all threads that are asking stop: their connections are shut."""
        self._cancelled.set()
        with self._lock:
            for connection in self._busy:
                if connection.sock is not None:
                    with contextlib.suppress(OSError):  # the server closed it already
                        connection.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connections that no request is using. The next request opens another one."""
        with self._lock:
            for connection in self._idle:
                connection.close()
            self._idle.clear()

    def _try(self, path: str, body: dict[str, Any] | None, as_text: bool) -> Any:
        """Send a request once. Return the JSON of the answer, or its text."""
        base = self._parts.path.rstrip("/")
        address = base.removesuffix("/v1") + path[1:] if path.startswith("//") else base + path
        accept = "text/plain" if as_text else "application/json"
        headers = {"Content-Type": "application/json", "Accept": accept}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        connection, keep = self._take(), False
        try:
            connection.request("GET" if data is None else "POST", address, body=data, headers=headers)
            response = connection.getresponse()
            answer, status = response.read(), response.status
            keep = True
        except (OSError, http.client.HTTPException) as problem:
            silent = self._limits.timeout if isinstance(problem, TimeoutError) else 0.0
            raise _Failed(f"{type(problem).__name__}: {problem}", silent=silent) from None
        finally:
            self._give_back(connection, keep)
        if status in RETRIED or (status >= 500 and status != 501):
            raise _Failed(f"HTTP {status}: {self._message(answer)}", _pause(response.headers.get("Retry-After")))
        if status != 200:
            message = f"{self.url} refused a request to {address} with HTTP {status}: {self._message(answer)}"
            raise Refused(message, status)
        if as_text:
            return answer.decode(errors="replace")
        try:
            return json.loads(answer)
        except ValueError:
            raise UnreadableAnswer(f"no JSON, but {answer[:100]!r}") from None

    def _take(self) -> Connection:
        """Return a connection that no other thread uses: an open one, if there is one."""
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else Connection
        with self._lock:
            connection = self._idle.pop() if self._idle else None
            connection = connection or kind(str(self._parts.hostname), self._parts.port, timeout=self._limits.timeout)
            self._busy.add(connection)
        return connection

    def _give_back(self, connection: Connection, keep: bool) -> None:
        with self._lock:
            self._busy.discard(connection)
            if keep:
                self._idle.append(connection)
            else:
                connection.close()

    def _message(self, answer: bytes) -> str:
        """Return what the server says about an error, without the key, which some servers repeat."""
        try:
            found = json.loads(answer)
            error = found.get("error", found.get("message", found))
            text = error.get("message", error) if isinstance(error, dict) else error
        except (ValueError, AttributeError):
            text = answer.decode(errors="replace")
        return self._without_key(str(text))[:500]

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _pause(value: str | None) -> float:
    """Return the seconds that a Retry-After header asks to wait, which it gives as a number or as a date."""
    if not value:
        return 0.0
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # no date, or one without a time zone
        return 0.0
