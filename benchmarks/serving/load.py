"""The loads of the table: those of `afd-server bench`, with fixed lengths and no prompt twice."""

import secrets
from collections.abc import Mapping
from itertools import islice, repeat

from afd_server.core.request import SLO
from afd_server.loadgen.client import BodyStyle, Client
from afd_server.loadgen.http import find_origin, get_json
from afd_server.loadgen.run import run_load
from afd_server.workload.arrivals import arrival_times
from afd_server.workload.lengths import UniformLengths
from afd_server.workload.limits import FixedLimit
from afd_server.workload.offers import Clients, make_offers, synthetic_shapes
from afd_server.workload.report import Outcome, summarise

VOCABULARY = range(100, 40000)
TIMEOUT_S = 600.0


class Workload:
    """Requests of fixed lengths; goes on from run to run, so that each is another one."""

    def __init__(self, input_len: int, output_len: int, seed: int) -> None:
        self.input_len = input_len
        self.seed = seed
        lengths = [UniformLengths(length, length) for length in (input_len, output_len)]
        self.shapes = synthetic_shapes(*lengths, f"{seed} {input_len}")


async def connect(url: str, headers: Mapping[str, str] | None = None) -> Client:
    origin = find_origin(url, headers or {})
    model = (await get_json(origin, "/v1/models"))["data"][0]["id"]
    style = BodyStyle("completions", model, VOCABULARY, secrets.token_hex(8), {})
    return Client(origin, style, TIMEOUT_S)


async def measure(
    client: Client,
    workload: Workload,
    *,
    count: int,
    tpot_slo_s: float,
    width: int | None = None,
    rate_per_s: float | None = None,
) -> dict:
    """Put a closed (`width`) or an open (`rate_per_s`) load on a server and sum it up.

    Of a closed one every stream gets the same number of requests, at least `count` in all.
    """
    if width is not None:
        times, count = repeat(None), -(-count // width) * width
        load = {"request_rate": "inf", "max_concurrency": width}
    else:
        times = arrival_times(rate_per_s, 1.0, count, f"{workload.seed} arrivals")
        load = {"request_rate": rate_per_s, "burstiness": 1.0}
    offers = islice(make_offers(times, workload.shapes, Clients(), ""), count)
    run = await run_load(client, offers, limit=None if width is None else FixedLimit(width))
    bad = [record for record in run.records if record.outcome is not Outcome.COMPLETED]
    return {
        **load,
        **summarise(run.records, SLO(tpot_s=tpot_slo_s)),
        "failed": len(bad),  # refused ones too: none may be missing in a figure
        "client_cpu_share": run.load.cpu_share,
        **({"errors": sorted({record.reason for record in bad})} if bad else {}),
    }


def show(run: dict) -> None:
    """Print a run's main figures in one line."""
    keys = ("output_throughput", "p50_ttft_ms", "p99_ttft_ms", "p50_tpot_ms", "p99_tpot_ms",
            "p99_itl_ms", "request_goodput", "completed", "failed", "client_cpu_share")  # fmt: skip
    name = f"c={run['max_concurrency']}" if "max_concurrency" in run else f"r={run['request_rate']}"
    print(name, "  ".join(f"{key} {run[key]:.4g}" for key in keys if key in run),
          *run.get("errors", ()), flush=True)  # fmt: skip
