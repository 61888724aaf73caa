"""The gateway process: the app, its server, its end."""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator

import uvicorn
from fastapi import FastAPI

from afd_server.gateway import errors
from afd_server.gateway.anthropic_routes import anthropic_routes
from afd_server.gateway.config import GatewaySpec
from afd_server.gateway.openai_routes import openai_routes
from afd_server.gateway.ops import ops_routes
from afd_server.gateway.service import Service
from afd_server.telemetry.log import configure_logging

log = logging.getLogger(__name__)

CLOSING_S = 2.0  # for clients to take the last bytes


def create_app(service: Service) -> FastAPI:
    """Return the HTTP application around a service; it runs the service while it runs."""

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        listening = asyncio.create_task(service.run())
        listening.add_done_callback(_end_process_with)
        try:
            yield
        finally:
            listening.remove_done_callback(_end_process_with)
            listening.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await listening

    app = FastAPI(title="afd_server", lifespan=lifespan, docs_url=None, redoc_url=None)
    errors.install(app)
    app.include_router(openai_routes(service))
    app.include_router(anthropic_routes(service))
    app.include_router(ops_routes(service))
    return app


def run_gateway(spec: GatewaySpec) -> None:
    """Serve until a stop signal, then drain.

    Raises:
        ModelError: the model directory cannot be used.
    """
    configure_logging("gateway", spec.log_level)
    service = Service(spec)
    config = uvicorn.Config(
        create_app(service),
        loop="uvloop",
        http="httptools",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=int(spec.shutdown_timeout_s + CLOSING_S),
    )
    server = _DrainingServer(config, service, spec.shutdown_timeout_s)
    listener = socket.socket(fileno=spec.listen_fd)
    server.run([listener])


class _DrainingServer(uvicorn.Server):
    """Lets running requests go on for a while after a stop signal, then ends them openly."""

    def __init__(self, config: uvicorn.Config, service: Service, patience_s: float) -> None:
        super().__init__(config)
        self._service = service
        self._patience_s = patience_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.stop_taking()
        ending = asyncio.get_running_loop().call_later(self._patience_s, self._service.end_all)
        await super().shutdown(sockets)
        ending.cancel()


def _end_process_with(task: "asyncio.Task[None]") -> None:
    """Fail loud (invariant I12): without its ear on the wire the gateway is of no use."""
    if not task.cancelled() and task.exception() is not None:
        log.critical("the gateway lost the wire", exc_info=task.exception())
        os._exit(1)
