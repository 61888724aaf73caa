"""HTTP/1.1 for one request at a time: each piece of the answer is handed on when it comes.

Each request has a connection of its own, as the requests of many users have. On the protocol's
own callbacks and httptools' parser: 17 µs of CPU for a streamed chunk on Zen 5 instead of 99 with
httpx, and the client often shares its CPU with what it measures.
"""

import asyncio
import json
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol  # Any: JSON
from urllib.parse import urlsplit

from httptools import HttpParserError, HttpResponseParser

from afd_server.core.errors import ConfigError, TransportError

CONNECT_S = 10.0


class Receiver(Protocol):
    """Takes an answer."""

    def begin(self, status: int, headers: Mapping[str, str]) -> None:
        """Take the status and the headers, their names in lower case."""
        ...

    def receive(self, data: bytes, now_s: float) -> None:
        """Take a piece of the body that came at `now_s` of the monotonic clock."""
        ...


@dataclass(frozen=True, slots=True)
class Origin:
    """A server's address and what every request to it carries.

    `address` is one that answered: names are not looked up again for each connection.
    """

    host: str
    address: str
    port: int
    tls: ssl.SSLContext | None
    prefix: str
    headers: Mapping[str, str]

    def request(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> bytes:
        """Return the bytes of a request; `path` is that below the server's URL."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        fields = {"host": f"{host}:{self.port}", "connection": "close"}
        fields |= {"content-type": "application/json", "content-length": str(len(body))}
        fields |= {**self.headers, **(headers or {})}
        lines = [f"{method} {self.prefix}{path} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in fields.items()]
        return "\r\n".join([*lines, "", ""]).encode() + body


def find_origin(url: str, headers: Mapping[str, str]) -> Origin:
    """Read a URL such as http://127.0.0.1:8000 and find an address that takes connections.

    Raises:
        ConfigError: it is no such URL.
        TransportError: nobody listens there.
    """
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise ConfigError(f"url is {url!r}: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
        raise ConfigError(f"url is {url!r}, must be like http://127.0.0.1:8000")
    try:
        with socket.create_connection((parts.hostname, port), CONNECT_S) as connection:
            address = connection.getpeername()[0]
    except OSError as error:
        raise TransportError(f"no server listens at {url}: {error}") from error
    tls = ssl.create_default_context() if parts.scheme == "https" else None
    prefix = parts.path.rstrip("/").removesuffix("/v1")  # OpenAI's own clients are given it
    return Origin(parts.hostname, address, port, tls, prefix, headers)


async def exchange(origin: Origin, request: bytes, receiver: Receiver) -> None:
    """Send a request and hand its answer over as it comes; returns when it is complete.

    Raises:
        TransportError: no connection, or it ended before the answer did, or it is no HTTP.
    """
    name = origin.host if origin.tls else None
    try:
        transport, protocol = await asyncio.get_running_loop().create_connection(
            lambda: _Exchange(receiver),
            origin.address, origin.port, ssl=origin.tls, server_hostname=name,
        )  # fmt: skip
    except OSError as error:
        raise TransportError(f"no connection: {error.strerror or error}") from error
    try:
        transport.write(request)
        await protocol.ended
    finally:
        transport.abort()


async def get_json(origin: Origin, path: str) -> Any:  # Any: JSON
    """Ask for a JSON document.

    Raises:
        TransportError: there is none: no answer in time, a status other than 200, no JSON.
    """
    document = _Document()
    try:
        async with asyncio.timeout(CONNECT_S):
            await exchange(origin, origin.request("GET", path), document)
        if document.status != 200:
            raise TransportError(f"{path} answered with status {document.status}")
        return json.loads(document.body)
    except TimeoutError as error:
        raise TransportError(f"{path} has not answered within {CONNECT_S:g} s") from error
    except ValueError as error:
        raise TransportError(f"{path} answered with something that is no JSON") from error


class _Document:
    """Keeps a whole answer."""

    def __init__(self) -> None:
        self.status = 0
        self.body = b""

    def begin(self, status: int, _headers: Mapping[str, str]) -> None:
        self.status = status

    def receive(self, data: bytes, _now_s: float) -> None:
        self.body += data


class _Exchange(asyncio.Protocol):
    """The answer on a connection. The methods are asyncio's and httptools' callbacks."""

    def __init__(self, receiver: Receiver) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._receiver = receiver
        self._parser = HttpResponseParser(self)
        self._headers: dict[str, str] = {}
        self._has_begun = False
        self._now_s = 0.0

    def data_received(self, data: bytes) -> None:
        self._now_s = time.monotonic()
        try:
            self._parser.feed_data(data)
        except HttpParserError as error:
            self._end(TransportError(f"the answer is no HTTP: {error}"))

    def connection_lost(self, error: Exception | None) -> None:
        framing = {"content-length", "transfer-encoding"}
        if error is None and self._has_begun and framing.isdisjoint(self._headers):
            self._end(None)  # where the answer ends (RFC 9112, section 6.3)
        cause = f": {error}" if error else ""
        self._end(TransportError(f"the connection ended before the answer{cause}"))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._has_begun = True
        self._receiver.begin(self._parser.get_status_code(), self._headers)

    def on_body(self, data: bytes) -> None:
        self._receiver.receive(data, self._now_s)

    def on_message_complete(self) -> None:
        self._end(None)

    def _end(self, error: TransportError | None) -> None:
        if self.ended.done():
            return
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)
