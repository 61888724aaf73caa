"""What operators and probes ask: health, readiness, version, status, metrics."""

from importlib.metadata import version

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from afd_server.core.topology import Member
from afd_server.gateway.service import Service

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

    return router


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
