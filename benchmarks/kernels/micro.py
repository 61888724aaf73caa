"""Every native kernel by itself, on the demo model's shapes, beside what one core can do at best.

python benchmarks/kernels/micro.py --output result.json
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch

from afd_server.kernels.cpu import available_builds, native_kernels
from afd_server.kernels.kv_format import store, stored_size
from afd_server.kernels.reference import PagedRun, plan_paged_rows, rope_table
from afd_server.kernels.sampling import noise_key
from afd_server.kernels.table import GQAWeights, Kernels, KVLayer, Norms
from afd_server.loadgen.environment import environment

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 576, 1536, 9, 3, 64, 49152
PRODUCTS = {
    "qkv": (HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM),
    "o": (HEADS * HEAD_DIM, HIDDEN),
    "gate_up": (HIDDEN, 2 * INNER),
    "down": (INNER, HIDDEN),
    "lm_head": (HIDDEN, VOCAB),
}
COLD_BYTES = 64e6  # cycled through, so that weights come from memory as in a real step


def median_s(call: Callable[[int], object], repeats: int) -> float:
    for number in range(3):
        call(number)
    times = []
    for number in range(repeats):
        begin = time.perf_counter()
        call(number)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def ceilings() -> dict[str, float]:
    """Bytes/s and multiply-adds/s of one core."""
    source = Path(__file__).with_name("ceilings.cpp")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "ceilings.so"
        command = ["g++", "-O3", "-march=native", "-fPIC", "-shared", source, "-o", library]
        subprocess.run(list(map(str, command)), check=True)
        native = ctypes.CDLL(str(library))
    for function in (native.read_rate, native.int8_rate, native.float_rate):
        function.restype = ctypes.c_double
    native.read_rate.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    data = torch.ones(256 << 20, dtype=torch.uint8)
    return {
        "read_bytes_s": max(native.read_rate(data.data_ptr(), data.numel()) for _ in range(5)),
        "int8_mac_s": max(native.int8_rate() for _ in range(5)),
        "float32_mac_s": max(native.float_rate() for _ in range(5)),
    }


def product(kernels: Kernels, width: int, columns: int, rows: int) -> dict[str, float]:
    copies = max(1, int(COLD_BYTES // (width * columns)))
    weights = [kernels.pack(torch.randn(columns, width)) for _ in range(copies)]
    x = kernels.prepare(torch.randn(rows, width))
    seconds = median_s(lambda n: kernels.linear(x, weights[n % copies]), 9 + 40 * (columns < 5000))
    num_bytes = sum(part.nbytes for part in kernels.dump(weights[0]).values())
    return {"us": seconds * 1e6, "bytes_s": num_bytes / seconds,
            "mac_s": rows * width * columns / seconds}  # fmt: skip


def attention(
    kernels: Kernels, dtype: torch.dtype, sequences: int, length: int, rows: int
) -> dict[str, float]:
    """`sequences` of `length` tokens, the last `rows` of which attend."""
    blocks = -(-length // 16)
    shape = (sequences * blocks, KV_HEADS, 16, HEAD_DIM)
    token_bytes = 2 * KV_HEADS * stored_size(HEAD_DIM, dtype) * dtype.itemsize
    copies = max(1, int(COLD_BYTES // (sequences * length * token_bytes)))
    layers = [
        KVLayer(store(torch.randn(shape), dtype), store(torch.randn(shape), dtype))
        for _ in range(copies)
    ]
    runs = [
        PagedRun(length - rows, rows, range(s * blocks, (s + 1) * blocks)) for s in range(sequences)
    ]
    plan, query = plan_paged_rows(runs), torch.randn(sequences * rows, HEADS, HEAD_DIM)
    seconds = median_s(lambda n: kernels.paged_attention(query, layers[n % copies], plan), 30)
    macs = int(plan.num_keys.sum()) * HEADS * HEAD_DIM * 2
    return {"us": seconds * 1e6, "bytes_s": sequences * length * token_bytes / seconds,
            "mac_s": macs / seconds}  # fmt: skip


def swiglu(kernels: Kernels, rows: int) -> dict[str, float]:
    """A whole FFN in one call."""
    copies = max(1, int(COLD_BYTES // (3 * HIDDEN * INNER)))
    ffns = [
        kernels.swiglu(
            kernels.pack(torch.randn(2 * INNER, HIDDEN)),
            kernels.pack(torch.randn(HIDDEN, INNER)),
            None,
        )
        for _ in range(copies)
    ]
    x = kernels.prepare(torch.randn(rows, HIDDEN))
    seconds = median_s(lambda n: ffns[n % copies](x), 49)
    macs = 3 * HIDDEN * INNER
    return {"us": seconds * 1e6, "bytes_s": macs / seconds, "mac_s": rows * macs / seconds}


def gqa(kernels: Kernels, sequences: int, length: int) -> dict[str, float]:
    """A layer from the residual to the rows of its FFN in one call, for sequences that decode."""
    qkv, width = (HEADS + 2 * KV_HEADS) * HEAD_DIM, HEADS * HEAD_DIM
    blocks, norm = -(-length // 16), torch.ones(HIDDEN)
    shape = (sequences * blocks, KV_HEADS, 16, HEAD_DIM)
    token_bytes = 2 * KV_HEADS * HEAD_DIM * 2
    weight_bytes = HIDDEN * qkv + width * HIDDEN
    copies = max(1, int(COLD_BYTES // (weight_bytes + sequences * length * token_bytes)))
    rope = rope_table(HEAD_DIM, 1e4, length)
    layers = [
        (
            kernels.gqa(
                GQAWeights(
                    kernels.pack(torch.randn(qkv, HIDDEN)),
                    kernels.pack(torch.randn(HIDDEN, width)),
                    rope,
                    Norms(norm, norm, 1e-5),
                    HEADS,
                    None,
                )
            ),
            KVLayer(*(torch.randn(shape).bfloat16() for _ in "kv")),
        )
        for _ in range(copies)
    ]
    runs = [PagedRun(length - 1, 1, range(s * blocks, (s + 1) * blocks)) for s in range(sequences)]
    plan, x = plan_paged_rows(runs), torch.randn(sequences, HIDDEN)
    positions = torch.full((sequences,), length - 1)
    slots = torch.tensor([s * blocks * 16 + length - 1 for s in range(sequences)])

    def call(number: int) -> object:
        layer, kv = layers[number % copies]
        return layer(x, x, positions, slots, plan, kv)

    seconds = median_s(call, 49)
    macs = sequences * (weight_bytes + length * HEADS * HEAD_DIM * 2)
    num_bytes = weight_bytes + sequences * length * token_bytes
    return {"us": seconds * 1e6, "bytes_s": num_bytes / seconds, "mac_s": macs / seconds}


# Of one row: bytes read and written, and operations on floats, as the sources have them: rotating
# and rounding a group takes 12 an element, a norm 4, silu · up 20, a rotation by position 3.
QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM
ROW_BYTES, INNER_BYTES = HIDDEN // 64 * 68, INNER // 64 * 68
COSTS = {
    "add_norm_quantise": (12 * HIDDEN + ROW_BYTES, 17 * HIDDEN),
    "quantise": (4 * HIDDEN + ROW_BYTES, 12 * HIDDEN),
    "rope_write_kv": (4 * QKV + 4 * HEADS * HEAD_DIM + 4 * KV_HEADS * HEAD_DIM, 3 * QKV),
    "silu_mul_quantise": (8 * INNER + INNER_BYTES, 32 * INNER),
    "argmax": (4 * VOCAB, VOCAB),
    "gumbel_argmax": (8 * VOCAB, 20 * VOCAB),
    "select top_k 40": (4 * VOCAB, VOCAB),
}


def row_kernels(kernels: Kernels, rows: int) -> dict[str, dict[str, float]]:
    """What is done to each row by itself."""
    x, norm = torch.randn(rows, HIDDEN), torch.ones(HIDDEN)
    gate_up, logits = torch.randn(rows, 2 * INNER), torch.randn(VOCAB) * 3
    qkv = torch.randn(rows, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    table, positions = rope_table(HEAD_DIM, 1e4, 512), torch.arange(rows)
    layer = KVLayer(*(torch.zeros(32, KV_HEADS, 16, HEAD_DIM).bfloat16() for _ in "kv"))
    calls = {
        "add_norm_quantise": lambda n: kernels.add_norm(x, x, norm, 1e-5),
        "quantise": lambda n: kernels.prepare(x),
        "rope_write_kv": lambda n: kernels.rope_write_kv(
            qkv, HEADS, table, positions, positions, layer
        ),
        "silu_mul_quantise": lambda n: kernels.silu_mul(gate_up),
    }
    if rows == 1:
        calls |= {
            "argmax": lambda n: kernels.argmax(logits),
            "gumbel_argmax": lambda n: kernels.gumbel_argmax(logits, None, 1.0, noise_key(n, 0, 0)),
            "select top_k 40": lambda n: kernels.select(logits, 1.0, 40, 1.0, 0.0),
        }
    got = {}
    for name, call in calls.items():
        seconds, (num_bytes, operations) = median_s(call, 200), COSTS[name]
        got[name] = {
            "us": seconds * 1e6,
            "bytes_s": rows * num_bytes / seconds,
            "mac_s": rows * operations / 2 / seconds,  # two operations are a multiply-add
        }
    return got


def show(name: str, got: dict[str, float], read_bytes_s: float, mac_s: float) -> None:
    print(
        f"{name:38}{got['us']:9.0f} us"
        f"{got['bytes_s'] / 1e9:7.1f} GB/s ({got['bytes_s'] / read_bytes_s:4.0%})"
        f"{got['mac_s'] / 1e9:8.1f} GMAC/s ({got['mac_s'] / mac_s:4.0%})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--build", choices=available_builds())
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    top = ceilings()
    print("one core:", ", ".join(f"{name} {value / 1e9:.1f} G" for name, value in top.items()))
    results: dict[str, object] = {"ceilings": top}
    int8 = native_kernels("int8", options.build)
    rows_of = (1, 4, 8, 16, 32, 128, 512)
    for weights in ("int8", "bfloat16", "float32"):
        kernels = native_kernels(weights, options.build)
        peak = top["int8_mac_s" if weights == "int8" else "float32_mac_s"]
        for name, (width, columns) in PRODUCTS.items():
            for rows in rows_of if name != "lm_head" else rows_of[:5]:
                got = product(kernels, width, columns, rows)
                results[f"{weights} {name} {rows}"] = got
                show(f"{weights} {name}, {rows} rows", got, top["read_bytes_s"], peak)
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        for sequences, length, rows in ((1, 256, 1), (16, 256, 1), (32, 256, 1), (1, 512, 512)):
            got = attention(int8, dtype, sequences, length, rows)
            name = f"attention {str(dtype)[6:]} {sequences} x {length}, {rows} rows"
            results[name] = got
            show(name, got, top["read_bytes_s"], top["float32_mac_s"])
    for rows in (1, 8, 16, 64, 128):
        name = f"swiglu, {rows} rows"
        results[name] = swiglu(int8, rows)
        show(name, results[name], top["read_bytes_s"], top["int8_mac_s"])
    for sequences, length in ((1, 256), (8, 256), (16, 256), (8, 1024)):
        name = f"gqa bfloat16 {sequences} x {length}"
        results[name] = gqa(int8, sequences, length)
        show(name, results[name], top["read_bytes_s"], top["int8_mac_s"])
    for rows in (1, 16, 128):
        for name, got in row_kernels(int8, rows).items():
            results[f"{name} {rows}"] = got
            show(f"{name}, {rows} rows", got, top["read_bytes_s"], top["float32_mac_s"])
    if options.output:
        result = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": environment(),
            "build": options.build or available_builds()[0],
            "results": results,
        }
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
