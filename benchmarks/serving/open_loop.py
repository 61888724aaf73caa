"""Load an OpenAI-compatible server and write down how it did.

Open loop by default: requests are sent when a Poisson process says so, answered or not. With
--concurrency it keeps that many streams busy instead. Prompts are random token ids, outputs have
an exact length, so that two runs do the same work.

    python benchmarks/serving/open_loop.py --url http://127.0.0.1:8000 --request-rate 0.5
    python benchmarks/serving/open_loop.py --concurrency 1,16 --output result.json
"""

import argparse
import asyncio
import json
import os
import platform
import random
import resource
import subprocess
import sys
import time
import uuid
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import httpx

from afd_server.workload.arrivals import poisson_arrivals
from afd_server.workload.report import RequestRecord, summarise


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
    num_input = len(body["prompt"][0])
    return RequestRecord(intended_s, sent_s, tuple(times), num_input, num_output, error)


def body_of(index: int, options: argparse.Namespace) -> dict:
    rng = random.Random(f"{options.seed} {index}")
    return {
        "prompt": [[rng.randrange(100, 40000) for _ in range(options.input_len)]],
        "max_tokens": options.output_len,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,  # a chunk for every token, also for those without text
        "stream_options": {"include_usage": True},
        "cache_salt": uuid.uuid4().hex,  # loads share prompts; each computes its own
    }


async def closed_loop(
    http: httpx.AsyncClient, options: argparse.Namespace, width: int
) -> list[RequestRecord]:
    """Keep `width` streams busy until each has done its share."""
    share = -(-(options.num_prompts or max(4, 2 * width)) // width)

    async def stream(number: int) -> list[RequestRecord]:
        return [
            await send(http, body_of(number * share + turn, options), time.monotonic())
            for turn in range(share)
        ]

    return sum(await asyncio.gather(*map(stream, range(width))), [])


async def open_loop(http: httpx.AsyncClient, options: argparse.Namespace) -> list[RequestRecord]:
    """Send at Poisson times, whatever the answers do."""
    begin_s = time.monotonic() + 0.1

    async def one(index: int, at_s: float) -> RequestRecord:
        intended_s = begin_s + at_s
        await asyncio.sleep(max(0.0, intended_s - time.monotonic()))
        return await send(http, body_of(index, options), intended_s)

    arrivals = poisson_arrivals(options.request_rate, options.num_prompts or 32, options.seed)
    return list(await asyncio.gather(*(one(i, at) for i, at in enumerate(arrivals))))


async def measure(options: argparse.Namespace) -> list[dict]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=options.url, timeout=600, limits=limits) as http:
        await send(http, body_of(-1, options), time.monotonic())  # warm up
        runs = []
        for width in options.concurrency or [None]:
            cpu = resource.getrusage(resource.RUSAGE_SELF)
            begin_s = time.monotonic()
            if width is None:
                records = await open_loop(http, options)
                load = {"request_rate": options.request_rate, "burstiness": 1.0}
            else:
                records = await closed_loop(http, options, width)
                load = {"request_rate": "inf", "max_concurrency": width}
            wall_s = time.monotonic() - begin_s
            used = resource.getrusage(resource.RUSAGE_SELF)
            client_s = used.ru_utime + used.ru_stime - cpu.ru_utime - cpu.ru_stime
            summary = summarise(records, options.tpot_slo_ms / 1000)
            runs.append({**load, "num_prompts": len(records), **summary,
                         "client_cpu_share": client_s / wall_s})  # fmt: skip
            show(runs[-1])
        status = (await http.get("/status")).json()
    runs[0]["topology"] = status.get("topology")
    return runs


def show(run: dict) -> None:
    keys = ("output_throughput", "p50_ttft_ms", "p99_ttft_ms", "p50_tpot_ms", "p99_tpot_ms",
            "p99_itl_ms", "request_goodput", "completed", "failed", "client_cpu_share")  # fmt: skip
    name = f"c={run['max_concurrency']}" if "max_concurrency" in run else f"r={run['request_rate']}"
    print(name, "  ".join(f"{key} {run[key]:.4g}" for key in keys if key in run), flush=True)


def environment() -> dict:
    model = next(
        (line.split(":", 1)[1].strip()
         for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines()
         if line.startswith("model name")),
        platform.processor(),
    )  # fmt: skip
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": version("torch"),
        "ray": version("ray"),
        "commit": commit.stdout.strip(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--request-rate", type=float, default=0.5, help="requests/s, open loop")
    parser.add_argument("--concurrency", type=lambda text: [int(n) for n in text.split(",")],
                        help="closed loop: streams kept busy, such as 1,16")  # fmt: skip
    parser.add_argument("--num-prompts", type=int, help="default: 32, or 2 a stream and 4 in all")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--tpot-slo-ms", type=float, default=50.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--label", default="", help="what is measured, for the result file")
    parser.add_argument("--output", type=Path, help="write a JSON result file")
    options = parser.parse_args()
    runs = asyncio.run(measure(options))
    if options.output:
        result = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "backend": "afd-server",
            "endpoint_type": "openai",
            "label": options.label,
            "environment": environment(),
            "workload": {"input_len": options.input_len, "output_len": options.output_len,
                         "seed": options.seed, "tpot_slo_ms": options.tpot_slo_ms},
            "runs": runs,
        }  # fmt: skip
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(any(run["failed"] for run in runs))


if __name__ == "__main__":
    main()
