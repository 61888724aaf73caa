"""A name for the bits that this machine computes.

Two workers of equal fingerprint give equal bits for equal input, as far as fixed test vectors
can tell; only such workers may stand in for each other (docs/protocol.md, section 4).
"""

import hashlib

import torch
from torch import Tensor

from afd_server.kernels.reference import plan_paged_rows
from afd_server.kernels.table import Kernels, KVLayer


def kernel_fingerprint(kernels: Kernels, dtype: torch.dtype) -> str:
    """Hash torch's version, the instruction set, the dtype and the output of every kernel.

    Returns:
        16 hex digits.
    """
    digest = hashlib.sha256()
    capability = torch.backends.cpu.get_cpu_capability()
    digest.update(f"{torch.__version__} {capability} {kernels.name} {dtype}".encode())
    for output in _test_outputs(kernels, dtype):
        digest.update(output.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _test_outputs(kernels: Kernels, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(20250727)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    rows, norm = draw(35, 192), draw(192)
    weight = kernels.pack(draw(96, 192))
    kv = KVLayer(draw(12, 16, 2, 32), draw(12, 16, 2, 32))
    paged = plan_paged_rows([1, 16, 65, 150], [list(range(2, 12))] * 4, block_size=16)
    return [
        kernels.linear(rows, weight),
        kernels.linear(rows[:1], weight),
        kernels.rms_norm(rows, norm, 1e-5),
        kernels.silu_mul(rows),
        kernels.paged_attention(draw(4, 6, 32), kv, paged),
    ]
