"""An OpenAI-compatible server without a model: it keeps its pace, or misbehaves as told."""

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn

Conduct = Callable[[int], str]


class FakeServer:
    """Streams tokens at a steady pace.

    `conduct` says for each request, by its number, what becomes of it: "serve", "pairs" (two
    tokens a chunk), "blank" (tokens after the first have no text), "refuse", "reject" (status
    400), "break", "error", "no usage", "short", "linger" (does not end after [DONE]), "silence"
    (never answers) or "die" (the server goes away).
    """

    def __init__(self, first_s: float, gap_s: float, conduct: Conduct) -> None:
        self.first_s = first_s
        self.gap_s = gap_s
        self.conduct = conduct
        self.max_model_len: int | None = 4096
        self.lists_models = True
        self.max_live: int | None = None  # refuses what comes beyond
        self._live = 0
        self.bodies: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.url = ""
        self.stop: Callable[[], None] = lambda: None

    async def __call__(self, scope, receive, send) -> None:
        assert scope["type"] == "http"
        if scope["path"] == "/v1/models":
            card = {"id": "fake", "max_model_len": self.max_model_len}
            return await _answer(send, 200, {"data": [card] if self.lists_models else []})
        if not scope["path"].startswith("/v1/"):
            return await _answer(send, 404, {})
        body = b""
        while True:
            message = await receive()
            body += message["body"]
            if not message["more_body"]:
                break
        number = len(self.bodies)
        self.bodies.append(json.loads(body))
        self.headers.append({k.decode(): v.decode() for k, v in scope["headers"]})
        if self.max_live is not None and self._live >= self.max_live:
            return await self._act("refuse", self.bodies[-1], send)
        self._live += 1
        try:
            return await self._act(self.conduct(number), self.bodies[-1], send)
        finally:
            self._live -= 1

    async def _act(self, conduct: str, body: dict, send) -> None:
        if conduct == "refuse":
            headers = [(b"x-afd-reject-reason", b"slo"), (b"retry-after", b"2")]
            return await _answer(send, 503, {"error": {"code": "overloaded"}}, headers)
        if conduct == "reject":
            return await _answer(send, 400, {"error": {"message": "no such model"}})
        if conduct == "die":
            return self.stop()
        if conduct == "silence":
            return await asyncio.sleep(30)
        return await self._stream(conduct, body, send)

    async def _stream(self, conduct: str, body: dict, send) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        count = body["max_tokens"] - (conduct == "short")
        at_once = 2 if conduct == "pairs" else 1
        await _event(send, {"choices": [{"delta": {"role": "assistant"}}]})
        await asyncio.sleep(self.first_s)
        for token in range(0, count, at_once):
            if conduct == "break" and token == 2:
                raise ConnectionAbortedError
            if conduct == "error" and token == 2:
                await _event(send, {"error": {"message": "a worker failed"}})
                break
            text = "" if conduct == "blank" and token else "x" * at_once
            await _event(send, {"choices": [{"text": text}]})
            await asyncio.sleep(self.gap_s)
        if conduct != "no usage":
            usage = {"prompt_tokens": len(body.get("prompt", "x")), "completion_tokens": count}
            await _event(send, {"choices": [], "usage": usage})
        lingers = conduct == "linger"
        done = {"type": "http.response.body", "body": b"data: [DONE]\r\n\r\n"}
        await send(done | {"more_body": lingers})
        if lingers:
            await asyncio.sleep(30)


@contextlib.contextmanager
def faking(
    first_s: float = 0.0, gap_s: float = 0.0, conduct: Conduct = lambda _number: "serve"
) -> Iterator[FakeServer]:
    """Run a fake server in a thread, on a port of its own."""
    fake = FakeServer(first_s, gap_s, conduct)
    config = uvicorn.Config(fake, log_level="critical", lifespan="off", timeout_keep_alive=1)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        fake.url = f"http://127.0.0.1:{listener.getsockname()[1]}"

        def stop() -> None:
            server.force_exit = server.should_exit = True

        fake.stop = stop
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield fake
        finally:
            stop()
            thread.join(10)


async def _event(send, chunk: dict) -> None:
    body = f"data: {json.dumps(chunk)}\r\n\r\n".encode()
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def _answer(send, status: int, document: dict, headers=()) -> None:
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})
    await send({"type": "http.response.body", "body": json.dumps(document).encode()})
