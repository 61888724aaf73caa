"""Load an OpenAI-compatible server and write down how it did.

Open loop by default: requests are sent when a Poisson process says so, answered or not. With
--concurrency it keeps that many streams busy instead.

    python benchmarks/serving/open_loop.py --url http://127.0.0.1:8000 --request-rate 0.5
    python benchmarks/serving/open_loop.py --concurrency 1,16 --output result.json
"""

import argparse
import asyncio
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import httpx
from client import Workload, measure, send, show

sys.path.append(str(Path(__file__).parents[1]))
from facts import environment


async def measure_all(options: argparse.Namespace) -> list[dict]:
    limits, slo_s = httpx.Limits(max_connections=None), options.tpot_slo_ms / 1000
    workload = Workload(options.input_len, options.output_len, options.seed)
    async with httpx.AsyncClient(base_url=options.url, timeout=600, limits=limits) as http:
        await send(http, workload.body(), time.monotonic())  # warm up
        runs = []
        for width in options.concurrency or [None]:
            count = options.num_prompts or (32 if width is None else max(4, 2 * width))
            rate = options.request_rate if width is None else None
            run = await measure(
                http, workload, count=count, tpot_slo_s=slo_s, width=width, rate_per_s=rate
            )
            runs.append(run)
            show(run)
        status = (await http.get("/status")).json()
    runs[0]["topology"] = status.get("topology")
    return runs


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
    runs = asyncio.run(measure_all(options))
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
