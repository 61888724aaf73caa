"""Measure whether admitted requests keep their TPOT target at any load, and what that costs.

Finds the highest rate that the server holds, offers multiples of it (Poisson, 32 to 256 tokens in
and out), and puts the same overload on the server without control and with caps on concurrency.
Each run is one of `afd-server bench`.

    python benchmarks/serving/targets.py             # about 25 minutes
    python benchmarks/serving/targets.py --seeds 1   # about 12

Nothing else may run on the machine. A JSON file goes to benchmarks/results.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from table import RESULTS, serving

from afd_server.loadgen.environment import environment

LOADS = (0.5, 1.0, 1.5, 2.0, 3.0)  # of the highest rate that is held
OVERLOAD = 2.0
CAPS = (12, 16, 20)
UNCONTROLLED = ("--max-live-requests", "100000")
MIX = "20:1,50:2,100:1"


def bench(url: str, *flags: object) -> dict:
    """Run `afd-server bench` and return its result."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "run.json"
        command = [
            sys.executable, "-m", "afd_server", "bench", "--url", url, "--output", output,
            "--input-len", "32:256", "--output-len", "32:256", *flags,
        ]  # fmt: skip
        subprocess.run(list(map(str, command)), check=False, stderr=subprocess.DEVNULL)
        return json.loads(output.read_text("utf-8"))


def point(label: str, load: float, run: dict) -> dict:
    """Return what is kept of a run."""
    slo, refusals = run["slo"], run["slo"]["refusals"]
    kept = {
        "label": label,
        "load": load,
        "request_rate": run["request_rate"],
        "seed": run["workload"]["seed"],
        "offered": run["num_prompts"],
        "completed": run["completed"],
        "failed": run["failed"],
        "refused": run["refused"],
        "attainment": slo["attainment"],
        "goodput": run["request_goodput"],
        "duration_s": run["duration"],
        **{key: run[key] for key in ("p50_tpot_ms", "p99_tpot_ms", "p99_itl_ms", "p50_ttft_ms",
                                     "p99_ttft_ms")},
        "refusals": refusals,
        "classes": slo.get("classes"),
        "client_cpu_share": run["client"]["cpu_share"],
    }  # fmt: skip
    attainment = "none" if kept["attainment"] is None else f"{kept['attainment']:.3f}"
    print(
        f"| {label} | {load:g} | {run['request_rate']:.3g} | {kept['offered']} | {attainment} | "
        f"{kept['goodput']:.2f} | {kept['p50_tpot_ms']:.1f} / {kept['p99_tpot_ms']:.1f} | "
        f"{kept['p99_itl_ms']:.0f} | {kept['p50_ttft_ms']:.0f} / {kept['p99_ttft_ms']:.0f} | "
        f"{kept['refused']} | {refusals.get('p99_ms') or 0:.0f} |",
        flush=True,
    )
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--launcher", default="local")
    parser.add_argument("--server-flags", default="")
    parser.add_argument("--duration-s", type=float, default=30.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rate", type=float, help="the highest that is held, if it is known")
    options = parser.parse_args()
    duration = ("--duration-s", options.duration_s)
    points = []
    print("| Server | Load | Requests/s | Offered | Attainment | Goodput /s | TPOT p50 / p99 ms | "
          "Gap p99 ms | TTFT p50 / p99 ms | Refused | p99 ms until refused |")  # fmt: skip
    print("| --- " * 11 + "|")
    with serving(options, slo_mode="enforce") as server:
        best = options.rate
        if best is None:
            found = bench(server.url, "--find-goodput", "--request-rate", 2, "--duration-s", 20)
            best = found["goodput_rate"]
        for load in LOADS:
            for seed in range(options.seeds):
                run = bench(server.url, "--request-rate", load * best, "--seed", seed, *duration)
                points.append(point("enforce", load, run))
        run = bench(server.url, "--request-rate", best, "--slo-mix", MIX, *duration)
        points.append(point(f"enforce, targets {MIX}", 1.0, run))
    for label, flags in [
        ("no control", ()), *((f"at most {cap} running", ("--max-num-seqs", cap)) for cap in CAPS)
    ]:  # fmt: skip
        with serving(options, *UNCONTROLLED, *map(str, flags)) as server:
            run = bench(server.url, "--request-rate", OVERLOAD * best, *duration)
            points.append(point(label, OVERLOAD, run))
    result = {"best_rate": best, "points": points, "environment": environment()}
    path = RESULTS / "targets.json"
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(f"best rate {best:.3g}/s; written to {path}")


if __name__ == "__main__":
    main()
