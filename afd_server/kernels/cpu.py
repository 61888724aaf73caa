"""The native CPU kernels: `native/kernels.cpp`, built at installation, called through ctypes.

Tensors are passed by address, without copies. The library for the best instruction set of this
machine is taken; all of them give the same bits.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from afd_server.core.errors import ConfigError
from afd_server.kernels.quant import Int8Weight, pack_int8
from afd_server.kernels.reference import REFERENCE, paged_attention
from afd_server.kernels.table import Kernels, KVLayer, PagedRows

LIBRARIES = Path(__file__).parent / "native"
COLUMNS = 16  # output channels interleaved in a packed block, as kernels.cpp has it

# What each build needs of the CPU, best first.
NEEDS: dict[str, tuple[str, ...]] = {
    "avx512vnni": ("avx512_vnni", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_cd"),
    "avx2": ("avx2", "fma3", "bmi2"),
    "portable": (),
}


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """An int8 weight as the native kernel reads it.

    Attributes:
        blocks: [out / 16, padded / 4, 16, 4] uint8, each value + 128; padded with zeros.
        scales: [out] float32.
        num_rows, num_columns: `out` and `in`.
    """

    blocks: Tensor
    scales: Tensor
    num_rows: int
    num_columns: int


def available_builds() -> list[str]:
    """Return the builds that are installed and that this CPU can run, best first."""
    cpu = torch.cpu.get_capabilities()
    return [
        name
        for name, needs in NEEDS.items()
        if _library_path(name).is_file() and all(cpu.get(need) for need in needs)
    ]


def native_int8(build: str | None = None) -> Kernels:
    """Return the kernels with int8 products, everything else in float32.

    Args:
        build: one of `available_builds`; None for the best.

    Raises:
        ConfigError: nothing was built for this machine.
    """
    builds = available_builds()
    if not builds or (build is not None and build not in builds):
        raise ConfigError(
            f"no native CPU kernels ({build or 'any'}) in {LIBRARIES}: the installation found no "
            "C++ compiler; install g++ and reinstall, or use --quantization none"
        )
    library = ctypes.CDLL(str(_library_path(build or builds[0])))
    return replace(
        REFERENCE,
        name="native-int8",
        pack=pack_native,
        linear=_linear(library),
        rms_norm=_rms_norm(library),
        rope=_rope(library),
        write_kv=_write_kv(library),
        paged_attention=_attention(library),
        silu_mul=_silu_mul(library),
    )


def pack_native(weight: Tensor) -> PackedWeight:
    """Quantise a weight [out, in] and interleave it for the native kernel."""
    return interleave(pack_int8(weight))


def interleave(weight: Int8Weight) -> PackedWeight:
    """Lay an int8 weight out in blocks of 16 output channels by 4 columns."""
    num_rows, padded = weight.values.shape
    values = F.pad(weight.values, (0, 0, 0, -num_rows % COLUMNS))
    shifted = (values.to(torch.int16) + 128).to(torch.uint8)
    blocks = shifted.view(-1, COLUMNS, padded // 4, 4).transpose(1, 2).contiguous()
    return PackedWeight(blocks, weight.scales.contiguous(), num_rows, weight.num_columns)


def _library_path(name: str) -> Path:
    return LIBRARIES / f"libafd_{name}.so"


def _linear(library: ctypes.CDLL) -> Callable[[Tensor, object], Tensor]:
    function = library.afd_linear_int8
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [pointer, size, size, size, pointer, pointer, size, pointer]
    function.restype = None

    def linear(x: Tensor, weight: object) -> Tensor:
        assert isinstance(weight, PackedWeight), "the weight was not packed for these kernels"
        assert x.dtype is torch.float32, f"int8 products take float32 rows, not {x.dtype}"
        x = x.contiguous()
        out = x.new_empty(x.shape[0], weight.num_rows)
        function(
            x.data_ptr(),
            x.shape[0],
            x.shape[1],
            weight.blocks.shape[1] * 4,
            weight.blocks.data_ptr(),
            weight.scales.data_ptr(),
            weight.num_rows,
            out.data_ptr(),
        )
        return out

    return linear


def _attention(library: ctypes.CDLL) -> Callable[[Tensor, KVLayer, PagedRows], Tensor]:
    function = library.afd_paged_attention
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [
        pointer, size, size, size, pointer, pointer, size, size, pointer, pointer, pointer, size,
        pointer,
    ]  # fmt: skip
    function.restype = ctypes.c_int32

    def attention(query: Tensor, layer: KVLayer, rows: PagedRows) -> Tensor:
        num_rows, num_heads, head_dim = query.shape
        block_size, num_kv_heads = layer.keys.shape[1:3]
        query = query.contiguous()
        out = query.new_empty(num_rows, num_heads * head_dim)
        done = query.dtype is torch.float32 and function(
            query.data_ptr(),
            num_rows,
            num_heads,
            head_dim,
            layer.keys.data_ptr(),
            layer.values.data_ptr(),
            block_size,
            num_kv_heads,
            rows.order.data_ptr(),
            rows.num_keys.data_ptr(),
            rows.block_tables.data_ptr(),
            rows.block_tables.shape[1],
            out.data_ptr(),
        )
        # head sizes that are not built in are left to the reference, always
        return out if done else paged_attention(query, layer, rows)

    return attention


def _rms_norm(library: ctypes.CDLL) -> Callable[[Tensor, Tensor, float], Tensor]:
    function = library.afd_rms_norm
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [pointer, pointer, size, size, ctypes.c_float, pointer]
    function.restype = None

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, out = x.contiguous(), torch.empty(x.shape)
        function(x.data_ptr(), weight.data_ptr(), *x.shape, eps, out.data_ptr())
        return out

    return rms_norm


def _silu_mul(library: ctypes.CDLL) -> Callable[[Tensor], Tensor]:
    function = library.afd_silu_mul
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [pointer, size, size, pointer]
    function.restype = None

    def silu_mul(gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty(num_rows, width)
        function(gate_up.data_ptr(), num_rows, width, out.data_ptr())
        return out

    return silu_mul


def _rope(library: ctypes.CDLL) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    function = library.afd_rope
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [pointer, size, pointer, pointer, size, size, size, pointer]
    function.restype = None

    def rope(x: Tensor, table: Tensor, positions: Tensor) -> Tensor:
        x, out = _heads_together(x), torch.empty(x.shape)
        function(
            x.data_ptr(),
            x.stride(0),
            table.data_ptr(),
            positions.data_ptr(),
            *x.shape,
            out.data_ptr(),
        )
        return out

    return rope


def _write_kv(library: ctypes.CDLL) -> Callable[[KVLayer, Tensor, Tensor, Tensor], None]:
    function = library.afd_write_rows
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [pointer, size, pointer, size, size, pointer]
    function.restype = None

    def write_kv(layer: KVLayer, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        for rows, blocks in ((keys, layer.keys), (values, layer.values)):
            rows = _heads_together(rows)
            width = rows.shape[1] * rows.shape[2]
            function(
                rows.data_ptr(),
                rows.stride(0),
                slots.data_ptr(),
                rows.shape[0],
                width,
                blocks.data_ptr(),
            )

    return write_kv


def _heads_together(x: Tensor) -> Tensor:
    """Return [rows, heads, head_dim] with each row's heads in one run; rows may lie apart."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
