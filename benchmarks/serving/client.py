"""The HTTP client of the serving benchmarks: bodies, loads, and what is written down.

Prompts are random token ids and outputs have an exact length, so that two runs do the same work.
No prompt is sent twice, so that no cache of prefixes can help.
"""

import asyncio
import itertools
import json
import random
import resource
import time

import httpx

from afd_server.workload.arrivals import poisson_arrivals
from afd_server.workload.report import RequestRecord, summarise


class Workload:
    """Draws request bodies of fixed lengths; each is another one."""

    def __init__(self, input_len: int, output_len: int, seed: int) -> None:
        self.input_len = input_len
        self.output_len = output_len
        self.seed = seed
        self._indices = itertools.count()

    def body(self) -> dict:
        rng = random.Random(f"{self.seed} {next(self._indices)} {self.input_len}")
        return {
            "prompt": [[rng.randrange(100, 40000) for _ in range(self.input_len)]],
            "max_tokens": self.output_len,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,  # a chunk for every token, also for those without text
            "stream_options": {"include_usage": True},
        }


async def send(http: httpx.AsyncClient, body: dict, intended_s: float) -> RequestRecord:
    """Stream one completion and note when each chunk came."""
    sent_s, times, num_output, error = time.monotonic(), [], 0, None
    try:
        async with http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                error = f"HTTP {response.status_code}"
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    error = chunk["error"]["message"]
                elif chunk["choices"]:
                    times.append(time.monotonic())
                if chunk.get("usage"):
                    num_output = chunk["usage"]["completion_tokens"]
    except httpx.HTTPError as failure:
        error = repr(failure)
    if error is None and num_output != body["max_tokens"]:
        error = f"{num_output} tokens instead of {body['max_tokens']}"
    num_input = len(body["prompt"][0])
    return RequestRecord(intended_s, sent_s, tuple(times), num_input, num_output, error)


async def closed_loop(
    http: httpx.AsyncClient, workload: Workload, width: int, count: int
) -> list[RequestRecord]:
    """Keep `width` streams busy until each has done its share of at least `count` requests."""

    async def stream() -> list[RequestRecord]:
        return [
            await send(http, workload.body(), time.monotonic()) for _ in range(-(-count // width))
        ]

    return sum(await asyncio.gather(*(stream() for _ in range(width))), [])


async def open_loop(
    http: httpx.AsyncClient, workload: Workload, rate_per_s: float, count: int
) -> list[RequestRecord]:
    """Send at Poisson times, whatever the answers do."""
    begin_s = time.monotonic() + 0.1

    async def one(at_s: float) -> RequestRecord:
        intended_s = begin_s + at_s
        await asyncio.sleep(max(0.0, intended_s - time.monotonic()))
        return await send(http, workload.body(), intended_s)

    arrivals = poisson_arrivals(rate_per_s, count, workload.seed)
    return list(await asyncio.gather(*map(one, arrivals)))


async def measure(
    http: httpx.AsyncClient,
    workload: Workload,
    *,
    count: int,
    tpot_slo_s: float,
    width: int | None = None,
    rate_per_s: float | None = None,
) -> dict:
    """Put a closed (`width`) or an open (`rate_per_s`) load on a server and sum it up."""
    before, begin_s = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    if width is not None:
        records = await closed_loop(http, workload, width, count)
        load = {"request_rate": "inf", "max_concurrency": width}
    else:
        records = await open_loop(http, workload, rate_per_s, count)
        load = {"request_rate": rate_per_s, "burstiness": 1.0}
    wall_s, after = time.monotonic() - begin_s, resource.getrusage(resource.RUSAGE_SELF)
    client_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    errors = sorted({record.error for record in records if record.error is not None})
    return {
        **load,
        "num_prompts": len(records),
        **summarise(records, tpot_slo_s),
        "client_cpu_share": client_s / wall_s,
        **({"errors": errors} if errors else {}),
    }


def show(run: dict) -> None:
    """Print a run's main figures in one line."""
    keys = ("output_throughput", "p50_ttft_ms", "p99_ttft_ms", "p50_tpot_ms", "p99_tpot_ms",
            "p99_itl_ms", "request_goodput", "completed", "failed", "client_cpu_share")  # fmt: skip
    name = f"c={run['max_concurrency']}" if "max_concurrency" in run else f"r={run['request_rate']}"
    print(name, "  ".join(f"{key} {run[key]:.4g}" for key in keys if key in run),
          *run.get("errors", ()), flush=True)  # fmt: skip
