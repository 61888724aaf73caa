"""A name for the bits that this machine computes.

Two workers of equal fingerprint give equal bits for equal input, as far as fixed test vectors
can tell; only such workers may stand in for each other (docs/protocol.md, section 7).
"""

import hashlib

import torch
from torch import Tensor

from afd_server.kernels.kv_format import store
from afd_server.kernels.reference import PagedRun, plan_paged_rows, rope_table
from afd_server.kernels.table import Kernels, KVLayer


def kernel_fingerprint(kernels: Kernels, dtype: torch.dtype, kv_dtype: torch.dtype) -> str:
    """Hash torch's version, the instruction set, the dtypes and the output of every kernel.

    Returns:
        16 hex digits.
    """
    digest = hashlib.sha256()
    capability = torch.backends.cpu.get_cpu_capability()
    digest.update(f"{torch.__version__} {capability} {kernels.name} {dtype} {kv_dtype}".encode())
    for output in _test_outputs(kernels, dtype, kv_dtype):
        digest.update(output.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _test_outputs(kernels: Kernels, dtype: torch.dtype, kv_dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(20250727)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    rows, norm = draw(49, 192), draw(192)  # products of 13 rows or more take another path
    weight = kernels.pack(draw(96, 192))
    kv = KVLayer(*(store(draw(12, 2, 16, 32), kv_dtype) for _ in KVLayer._fields))
    runs = [PagedRun(stop - 1, 1, list(range(2, 12))) for stop in (1, 16, 65)]
    paged = plan_paged_rows([*runs, PagedRun(140, 9, list(range(2, 12)))])
    positions = torch.arange(12, dtype=torch.int64)
    table = rope_table(32, 1e4, 12)
    ffn = kernels.swiglu(kernels.pack(draw(256, 192)), kernels.pack(draw(96, 128)), None)
    query = kernels.rope_write_kv(draw(12, 320), 6, table, positions, positions + 40, kv)
    return [
        kernels.linear(kernels.prepare(rows), weight),
        kernels.linear(kernels.prepare(rows[:1]), weight),
        kernels.rms_norm(rows, norm, 1e-5),
        *kernels.add_norm(rows, rows, norm, 1e-5),
        kernels.silu_mul(rows),
        kernels.silu_mul(rows, 0.5),
        ffn(kernels.prepare(rows)),
        query,
        kernels.paged_attention(query, kv, paged),
    ]
