"""What operators and probes ask: health, readiness, version, status, metrics, traces."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from importlib.metadata import version

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from afd_server.core.errors import InvalidRequest
from afd_server.core.topology import Member
from afd_server.gateway.service import Service
from afd_server.gateway.stage_view import KEPT_S

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def ops_routes(service: Service) -> APIRouter:
    """Return the routes outside of /v1."""
    router = APIRouter()
    spec = service.spec

    @router.get("/live")
    async def live() -> JSONResponse:
        """Answer as long as this process can; says nothing of the workers."""
        return JSONResponse({"status": "ok"})

    @router.get("/ready")
    async def ready() -> JSONResponse:
        """Say whether requests are served: an attention worker, every FFN part, not stopping."""
        missing = service.pools.missing(1, spec.num_ffn_parts)
        if service.is_draining:
            missing.append("the server is stopping")
        return _verdict(missing)

    @router.get("/health")
    async def health() -> JSONResponse:
        """Say whether all workers are there, report, and make progress."""
        missing = service.pools.missing(spec.num_attention, spec.num_ffn)
        return _verdict(missing + service.pools.trouble())

    @router.get("/version")
    async def show_version() -> JSONResponse:
        return JSONResponse({"version": version("afd-server")})

    @router.get("/status")
    async def status() -> JSONResponse:
        topology = service.pools.topology
        return JSONResponse(
            {
                "model": service.model_name,
                "topology": topology.notation,
                "epoch": topology.epoch,
                "system_fingerprint": service.system_fingerprint,
                "live_requests": service.generations.num_live,
                "trouble": service.pools.trouble(),
                "workers": [_worker(service, member) for member in service.pools.workers()],
            }
        )

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.render(), headers={"content-type": METRICS_TYPE})

    @router.get("/debug/trace")
    async def trace(request: Request) -> StreamingResponse:
        """Return what every worker did in the last `seconds`, as a Chrome trace."""
        seconds = _seconds(request.query_params.get("seconds", "5"))
        return StreamingResponse(
            _one_by_one(service.stages.trace(seconds)), media_type="application/json"
        )

    @router.get("/debug/experts")
    async def experts(request: Request) -> JSONResponse:
        """Return the `hottest` experts of each layer since the start, for --hot-experts."""
        return JSONResponse(service.experts.hottest(_number(request.query_params.get("hottest"))))

    return router


def _number(text: str | None) -> int:
    if text is None or not text.isdecimal() or int(text) < 1:
        raise InvalidRequest(f"hottest is {text!r}, must be a number of experts", "hottest")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= KEPT_S:
        raise InvalidRequest(f"seconds is {text!r}, must be in 0 … {KEPT_S:.0f}", "seconds")
    return seconds


async def _one_by_one(pieces: Iterator[str]) -> AsyncIterator[str]:
    """Let requests go on between two pieces: each takes milliseconds."""
    for piece in pieces:
        yield piece
        await asyncio.sleep(0)


def _verdict(trouble: list[str]) -> JSONResponse:
    if trouble:
        return JSONResponse({"status": "unavailable", "trouble": trouble}, 503)
    return JSONResponse({"status": "ok"})


def _worker(service: Service, member: Member) -> dict[str, object]:
    report = service.pools.report(member.incarnation)
    load = (
        {}
        if report is None
        else {
            "steps": report.steps,
            "running": report.running,
            "waiting": report.waiting,
            "free_blocks": report.free_blocks,
            "cached_blocks": report.cached_blocks,
            "num_blocks": report.num_blocks,
            "rows": report.rows,
        }
    )
    return {
        "name": member.name,
        "incarnation": member.incarnation,
        "address": member.address,
        "load": load,
    }
