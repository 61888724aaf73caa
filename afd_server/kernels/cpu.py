"""The native CPU kernels: `native/kernels.cpp`, built at installation, called through ctypes.

Tensors are passed by address, without copies. The library for the best instruction set of this
machine is taken; all of them give the same bits. Rows and activations are float32; weights are
kept as int8, float32 or bfloat16, keys and values as float32, bfloat16 or int8 with a scale.
"""

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from afd_server.core.errors import ConfigError
from afd_server.kernels import reference
from afd_server.kernels.quant import GROUP, Int8Weight, pack_int8, quantised_row_bytes
from afd_server.kernels.table import (
    BoundSwiGLU,
    GQAWeights,
    Kernels,
    KVLayer,
    LinearWeight,
    NativeAttention,
    NativeCall,
    PagedAttention,
    PagedRows,
    RowFormat,
    SiLUMul,
)

LIBRARIES = Path(__file__).parent / "native"
INTERFACE = 8  # as `afd_interface` of native/kernels.cpp
COLUMNS = 16  # output channels interleaved in a packed block, as kernels.cpp has it

WeightFormat = Literal["int8", "float32", "bfloat16"]
_DTYPES = {"int8": torch.int8, "float32": torch.float32, "bfloat16": torch.bfloat16}
_KV_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}  # as kernels.cpp has them

# What each build needs of the CPU, best first.
NEEDS: dict[str, tuple[str, ...]] = {
    "avx512vnni": ("avx512_vnni", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_cd"),
    "avx2": ("avx2", "fma3", "bmi2"),
    "portable": (),
}


@dataclass(frozen=True, slots=True)
class PackedInt8:
    """An int8 weight as the native kernel reads it.

    Attributes:
        blocks: [out / 16, padded / 4, 16, 4] uint8, each value + 128; padded with zeros.
        scales: [out / 16, groups, 16] float32.
        num_rows: `out`.
    """

    blocks: Tensor
    scales: Tensor
    num_rows: int


@dataclass(frozen=True, slots=True)
class PackedFloat:
    """A float32 or bfloat16 weight: blocks [out / 16, in, 16], padded with zeros."""

    blocks: Tensor
    num_rows: int


def available_builds() -> list[str]:
    """Return the builds that are installed and that this CPU can run, best first."""
    cpu = torch.cpu.get_capabilities()
    return [
        name
        for name, needs in NEEDS.items()
        if _library_path(name).is_file() and all(cpu.get(need) for need in needs)
    ]


def native_kernels(weights: WeightFormat, build: str | None = None) -> Kernels:
    """Return the native kernels for one format of weights.

    Args:
        weights: how `pack` keeps them. int8 also quantises the rows that are multiplied.
        build: one of `available_builds`; None for the best.

    Raises:
        ConfigError: nothing was built for this machine, or from other sources.
    """
    builds = available_builds()
    if not builds or (build is not None and build not in builds):
        raise ConfigError(
            f"no native CPU kernels ({build or 'any'}) in {LIBRARIES}: the installation found no "
            "C++ compiler; install g++ and reinstall"
        )
    library = _load(_library_path(build or builds[0]))
    quantised = weights == "int8"
    linear = _linear_int8(library) if quantised else _linear_float(library)
    silu_mul = _silu_mul(library, quantised)
    kernels = Kernels(
        name=f"native-{weights}",
        row_format=RowFormat(torch.uint8, quantised_row_bytes)
        if quantised
        else RowFormat(torch.float32, lambda width: width),
        pack=pack_native_int8 if quantised else _pack_float(_DTYPES[weights]),
        pack_parts=("blocks", "scales", "num_rows") if quantised else ("blocks", "num_rows"),
        dump=_dump,
        unpack=_unpack,
        prepare=_quantise(library) if quantised else lambda x: x,
        linear=linear,
        bind=partial(_product_int8, library) if quantised else (lambda weight: None),
        rms_norm=_rms_norm(library),
        add_norm=_add_norm_quantise(library) if quantised else _add_norm(library),
        rope=_rope(library),
        write_kv=_write_kv(library),
        rope_write_kv=_rope_write_kv(library),
        paged_attention=_attention(library),
        gqa=(lambda weights: _GQAInt8(library, kernels, weights))
        if quantised
        else (lambda weights: reference.PlainGQA(lambda: kernels, weights)),
        silu_mul=silu_mul,
        swiglu=_swiglu_int8(library)
        if quantised
        else partial(reference.PlainSwiGLU, linear, silu_mul),
        argmax=_argmax(library),
        gumbel_argmax=_gumbel_argmax(library),
        select=_select(library),
    )
    return kernels


def pack_native_int8(weight: Tensor) -> PackedInt8:
    """Quantise a weight [out, in] and interleave it for the native kernel."""
    return interleave(pack_int8(weight))


def interleave(weight: Int8Weight) -> PackedInt8:
    """Lay an int8 weight out in blocks of 16 output channels by 4 columns."""
    num_rows, groups, _ = weight.values.shape
    values = F.pad(weight.values.flatten(1), (0, 0, 0, -num_rows % COLUMNS))
    blocks = values.view(-1, COLUMNS, groups * GROUP // 4, 4).transpose(1, 2).contiguous()
    shifted = blocks.view(torch.uint8).bitwise_xor_(128)  # adds 128 to a two's complement
    scales = F.pad(weight.scales, (0, 0, 0, -num_rows % COLUMNS))
    return PackedInt8(
        shifted, scales.view(-1, COLUMNS, groups).transpose(1, 2).contiguous(), num_rows
    )


def _pack_float(dtype: torch.dtype) -> Callable[[Tensor], PackedFloat]:
    def pack(weight: Tensor) -> PackedFloat:
        padded = F.pad(weight.to(dtype), (0, 0, 0, -weight.shape[0] % COLUMNS))
        blocks = padded.view(-1, COLUMNS, weight.shape[1]).transpose(1, 2).contiguous()
        return PackedFloat(blocks, weight.shape[0])

    return pack


def _dump(weight: LinearWeight) -> dict[str, Tensor]:
    assert isinstance(weight, PackedInt8 | PackedFloat), "the weight was not packed for these"
    parts = {"blocks": weight.blocks, "num_rows": torch.tensor(weight.num_rows)}
    return parts | ({"scales": weight.scales} if isinstance(weight, PackedInt8) else {})


def _unpack(parts: dict[str, Tensor]) -> PackedInt8 | PackedFloat:
    blocks, num_rows = parts["blocks"], int(parts["num_rows"])
    if "scales" in parts:
        return PackedInt8(blocks, parts["scales"], num_rows)
    return PackedFloat(blocks, num_rows)


def _library_path(name: str) -> Path:
    return LIBRARIES / f"libafd_{name}.so"


_POINTER, _SIZE, _FLAG, _FLOAT, _DOUBLE = (
    ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_double,
)  # fmt: skip


def _load(path: Path) -> ctypes.CDLL:
    """Load a library; one that takes other arguments would crash, so it is refused."""
    library = ctypes.CDLL(str(path))
    if not hasattr(library, "afd_interface") or library.afd_interface() != INTERFACE:
        raise ConfigError(
            f"{path} was built from other sources than this package; install the package again"
        )
    return library


def _quantise(library: ctypes.CDLL) -> Callable[[Tensor], Tensor]:
    function = library.afd_quantise
    function.argtypes = [_POINTER, _SIZE, _SIZE, _POINTER]
    function.restype = None

    def quantise(x: Tensor) -> Tensor:
        x = x.contiguous()
        out = _quantised_rows(*x.shape)
        function(x.data_ptr(), *x.shape, out.data_ptr())
        return out

    return quantise


def _quantised_rows(num_rows: int, width: int) -> Tensor:
    return torch.empty(num_rows, quantised_row_bytes(width), dtype=torch.uint8)


def _linear_int8(library: ctypes.CDLL) -> Callable[[Tensor, object], Tensor]:
    function = library.afd_linear_int8
    function.argtypes = [_POINTER, _SIZE, _SIZE, _POINTER, _POINTER, _SIZE, _POINTER]
    function.restype = None

    def linear(x: Tensor, weight: object) -> Tensor:
        assert isinstance(weight, PackedInt8), "the weight was not packed for these kernels"
        groups = weight.scales.shape[1]
        assert x.dtype is torch.uint8 and x.shape[1] == groups * (4 + GROUP), (
            f"rows of {x.dtype} [{x.shape[1]}] for {groups} groups; were they prepared?"
        )
        x, out = x.contiguous(), torch.empty(x.shape[0], weight.num_rows)
        function(
            x.data_ptr(),
            x.shape[0],
            groups,
            weight.blocks.data_ptr(),
            weight.scales.data_ptr(),
            weight.num_rows,
            out.data_ptr(),
        )
        return out

    return linear


class _Product(ctypes.Structure):
    """A weight as kernels.cpp has it."""

    _fields_ = (
        ("groups", _SIZE), ("columns", _SIZE), ("weight", _POINTER), ("scales", _POINTER),
    )  # fmt: skip


def _product_int8(library: ctypes.CDLL, weight: object) -> NativeCall:
    assert isinstance(weight, PackedInt8), "the weight was not packed for these kernels"
    groups, parts = weight.scales.shape[1], (weight.blocks, weight.scales)
    product = _Product(groups, weight.num_rows, *(part.data_ptr() for part in parts))
    address = _address(library.afd_product_int8)
    return NativeCall(
        address,
        ctypes.addressof(product),
        groups * (4 + GROUP),
        weight.num_rows,
        (product, weight, library),
    )


def _address(function: object) -> int:
    address = ctypes.cast(function, ctypes.c_void_p).value  # type: ignore[arg-type]
    assert address is not None, "a function of a loaded library"
    return address


def _linear_float(library: ctypes.CDLL) -> Callable[[Tensor, object], Tensor]:
    function = library.afd_linear_float
    function.argtypes = [_POINTER, _SIZE, _SIZE, _POINTER, _FLAG, _SIZE, _POINTER]
    function.restype = None

    def linear(x: Tensor, weight: object) -> Tensor:
        assert isinstance(weight, PackedFloat), "the weight was not packed for these kernels"
        blocks = weight.blocks
        assert x.dtype is torch.float32 and x.shape[1] == blocks.shape[1], (
            f"rows of {x.dtype} [{x.shape[1]}] for {blocks.shape[1]} columns"
        )
        x, out = x.contiguous(), torch.empty(x.shape[0], weight.num_rows)
        function(
            x.data_ptr(),
            *x.shape,
            blocks.data_ptr(),
            blocks.dtype is torch.bfloat16,
            weight.num_rows,
            out.data_ptr(),
        )
        return out

    return linear


def _attention(library: ctypes.CDLL) -> PagedAttention:
    function = library.afd_paged_attention
    function.argtypes = [
        _POINTER, _SIZE, _SIZE, _POINTER, _POINTER, _FLAG, _SIZE, _SIZE, _SIZE, _POINTER,
        _POINTER, _POINTER, _SIZE, _SIZE, _POINTER,
    ]  # fmt: skip
    function.restype = _FLAG

    def attention(
        query: Tensor, layer: KVLayer, rows: PagedRows, window: int | None = None
    ) -> Tensor:
        num_rows, num_heads, head_dim = query.shape
        num_kv_heads, block_size = layer.keys.shape[1:3]
        if layer.values.shape != layer.keys.shape:  # parts of the keys
            return reference.paged_attention(query, layer, rows, window)
        query, out = query.contiguous(), torch.empty(num_rows, num_heads * head_dim)
        done = function(
            query.data_ptr(),
            num_heads,
            head_dim,
            layer.keys.data_ptr(),
            layer.values.data_ptr(),
            _KV_FORMATS[layer.keys.dtype],
            block_size,
            num_kv_heads,
            rows.block_tables.shape[0],
            rows.row_starts.data_ptr(),
            rows.num_keys.data_ptr(),
            rows.block_tables.data_ptr(),
            rows.block_tables.shape[1],
            window or 0,
            out.data_ptr(),
        )
        # head sizes that are not built in are left to the reference, always
        return out if done else reference.paged_attention(query, layer, rows, window)

    return attention


def _rms_norm(library: ctypes.CDLL) -> Callable[[Tensor, Tensor, float], Tensor]:
    function = library.afd_rms_norm
    function.argtypes = [_POINTER, _POINTER, _SIZE, _SIZE, _FLOAT, _POINTER]
    function.restype = None

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, out = x.contiguous(), torch.empty(x.shape)
        width = x.shape[-1]
        num_rows = x.numel() // width
        function(x.data_ptr(), weight.data_ptr(), num_rows, width, eps, out.data_ptr())
        return out

    return rms_norm


AddNorm = Callable[[Tensor, Tensor | None, Tensor, float], tuple[Tensor, Tensor]]


def _add_norm(library: ctypes.CDLL) -> AddNorm:
    rms_norm = _rms_norm(library)

    def add_norm(
        x: Tensor, delta: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total = x if delta is None else x + delta
        return total, rms_norm(total, weight, eps)

    return add_norm


def _add_norm_quantise(library: ctypes.CDLL) -> AddNorm:
    function = library.afd_add_norm_quantise
    function.argtypes = [
        _POINTER, _POINTER, _POINTER, _SIZE, _SIZE, _FLOAT, _POINTER, _POINTER,
    ]  # fmt: skip
    function.restype = None

    def add_norm(
        x: Tensor, delta: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        x, out = x.contiguous(), _quantised_rows(*x.shape)
        delta = None if delta is None else delta.contiguous()
        total = x if delta is None else torch.empty(x.shape)
        function(
            x.data_ptr(),
            None if delta is None else delta.data_ptr(),
            weight.data_ptr(),
            *x.shape,
            eps,
            total.data_ptr(),
            out.data_ptr(),
        )
        return total, out

    return add_norm


def _silu_mul(library: ctypes.CDLL, quantised: bool) -> SiLUMul:
    function = library.afd_silu_mul_quantise if quantised else library.afd_silu_mul
    function.argtypes = [_POINTER, _SIZE, _SIZE, _FLOAT, _POINTER]
    function.restype = None

    def silu_mul(gate_up: Tensor, limit: float | None = None) -> Tensor:
        bound = math.inf if limit is None else limit
        gate_up = gate_up.contiguous()
        num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = _quantised_rows(num_rows, width) if quantised else torch.empty(num_rows, width)
        function(gate_up.data_ptr(), num_rows, width, bound, out.data_ptr())
        return out

    return silu_mul


class _GQA(ctypes.Structure):
    """One layer up to its FFN as kernels.cpp has it."""

    _fields_ = (
        ("heads", _SIZE), ("kv_heads", _SIZE), ("head_dim", _SIZE), ("hidden", _SIZE),
        ("window", _SIZE), ("qkv", _POINTER), ("output", _POINTER), ("qkv_scales", _POINTER),
        ("output_scales", _POINTER), ("rope", _POINTER), ("norm_before", _POINTER),
        ("norm_after", _POINTER), ("eps", _DOUBLE),
    )  # fmt: skip


class _KVBlocks(ctypes.Structure):
    """The keys and values of a layer, as kernels.cpp has it."""

    _fields_ = (
        ("keys", _POINTER), ("values", _POINTER), ("format", _SIZE), ("block_size", _SIZE),
    )  # fmt: skip


class _Seen(ctypes.Structure):
    """What the rows of a micro-batch see, as kernels.cpp has it."""

    _fields_ = (
        ("sequences", _SIZE), ("table_width", _SIZE), ("positions", _POINTER),
        ("slots", _POINTER), ("row_starts", _POINTER), ("num_keys", _POINTER),
        ("block_tables", _POINTER),
    )  # fmt: skip


def _blocks_of(layer: KVLayer) -> _KVBlocks:
    keys, values = layer
    return _KVBlocks(keys.data_ptr(), values.data_ptr(), _KV_FORMATS[keys.dtype], keys.shape[2])


def _seen_of(positions: Tensor, slots: Tensor, rows: PagedRows) -> _Seen:
    kept = rows.derived.get("seen")
    if kept is not None:
        return cast(_Seen, kept[0])
    tables = rows.block_tables
    seen = _Seen(
        *tables.shape,
        positions.data_ptr(),
        slots.data_ptr(),
        rows.row_starts.data_ptr(),
        rows.num_keys.data_ptr(),
        tables.data_ptr(),
    )
    rows.derived["seen"] = seen, positions, slots
    return seen


class _GQAInt8:
    """One layer up to its FFN in a single call of the library."""

    def __init__(self, library: ctypes.CDLL, kernels: Kernels, weights: GQAWeights) -> None:
        qkv, output, rope = weights.qkv, weights.output, weights.rope
        assert isinstance(qkv, PackedInt8) and isinstance(output, PackedInt8), "not packed"
        norms = (weights.norms.before.contiguous(), weights.norms.after.contiguous())
        head_dim = rope.shape[-1]
        self._plain = reference.PlainGQA(lambda: kernels, weights)
        self._function = library.afd_gqa_int8
        self._function.argtypes = [
            _POINTER, _POINTER, _POINTER, _SIZE, _POINTER, _POINTER, _POINTER, _POINTER,
        ]  # fmt: skip
        self._function.restype = _FLAG
        self._layer = _GQA(
            weights.num_heads,
            (qkv.num_rows // head_dim - weights.num_heads) // 2,
            head_dim,
            output.num_rows,
            weights.window or 0,
            qkv.blocks.data_ptr(),
            output.blocks.data_ptr(),
            qkv.scales.data_ptr(),
            output.scales.data_ptr(),
            rope.data_ptr(),
            *(norm.data_ptr() for norm in norms),
            weights.norms.eps,
        )
        self._address = ctypes.addressof(self._layer)
        owner = (self._layer, qkv, output, rope, norms, self._function)
        self.native: NativeAttention | None = NativeAttention(
            _address(self._function), self._address, _blocks_of, _seen_of, owner
        )

    def __call__(
        self,
        hidden: Tensor,
        delta: Tensor | None,
        positions: Tensor,
        slots: Tensor,
        paged: PagedRows,
        layer: KVLayer,
    ) -> tuple[Tensor, Tensor]:
        blocks, seen = _blocks_of(layer), _seen_of(positions, slots, paged)
        hidden, total = hidden.contiguous(), torch.empty(hidden.shape)
        delta = None if delta is None else delta.contiguous()
        out = _quantised_rows(*hidden.shape)
        done = self._function(
            self._address,
            hidden.data_ptr(),
            None if delta is None else delta.data_ptr(),
            hidden.shape[0],
            ctypes.addressof(blocks),
            ctypes.addressof(seen),
            total.data_ptr(),
            out.data_ptr(),
        )
        return (total, out) if done else self._plain(hidden, delta, positions, slots, paged, layer)


class _SwiGLU(ctypes.Structure):
    """One FFN as kernels.cpp has it."""

    _fields_ = (
        ("groups", _SIZE), ("inner", _SIZE), ("hidden", _SIZE), ("gate_up", _POINTER),
        ("down", _POINTER), ("gate_up_scales", _POINTER), ("down_scales", _POINTER),
        ("limit", _DOUBLE),
    )  # fmt: skip


class _SwiGLUInt8:
    """One FFN, or a half of it, in a single call of the library.

    Args:
        function: computes it.
        of_halves: those that compute its two halves by themselves.
        gate_up, down, limit: as `Kernels.swiglu` takes them.
    """

    def __init__(
        self,
        function: Callable[..., None],
        of_halves: Sequence[Callable[..., None]],
        gate_up: object,
        down: object,
        limit: float | None,
    ) -> None:
        assert isinstance(gate_up, PackedInt8) and isinstance(down, PackedInt8), "not packed"
        self._function = function
        self._width = down.num_rows
        self._bytes = gate_up.scales.shape[1] * (4 + GROUP)
        ffn = _SwiGLU(
            gate_up.scales.shape[1],
            gate_up.num_rows // 2,
            down.num_rows,
            gate_up.blocks.data_ptr(),
            down.blocks.data_ptr(),
            gate_up.scales.data_ptr(),
            down.scales.data_ptr(),
            math.inf if limit is None else limit,
        )
        self._context = ctypes.addressof(ffn)
        owner = (ffn, gate_up, down, function)
        self.native: NativeCall | None = NativeCall(
            _address(function), self._context, self._bytes, self._width, owner
        )
        self.halves: tuple[BoundSwiGLU, BoundSwiGLU] | None = None
        if of_halves and ffn.inner % COLUMNS == 0 and ffn.inner > GROUP:
            first, second = (_SwiGLUInt8(f, (), gate_up, down, limit) for f in of_halves)
            self.halves = first, second

    def __call__(self, rows: Tensor) -> Tensor:
        assert rows.dtype is torch.uint8 and rows.shape[1] == self._bytes, (
            f"rows of {rows.dtype} [{rows.shape[1]}] for {self._bytes}; were they prepared?"
        )
        rows, out = rows.contiguous(), torch.empty(rows.shape[0], self._width)
        self._function(self._context, rows.data_ptr(), rows.shape[0], out.data_ptr())
        return out


def _swiglu_int8(
    library: ctypes.CDLL,
) -> Callable[[LinearWeight, LinearWeight, float | None], BoundSwiGLU]:
    functions = (
        library.afd_swiglu_int8,
        library.afd_swiglu_first_int8,
        library.afd_swiglu_second_int8,
    )
    for function in functions:
        function.argtypes = [_POINTER, _POINTER, _SIZE, _POINTER]
        function.restype = None
    whole, *of_halves = functions
    return partial(_SwiGLUInt8, whole, of_halves)


def _rope(library: ctypes.CDLL) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    function = library.afd_rope
    function.argtypes = [
        _POINTER, _SIZE, _POINTER, _POINTER, _SIZE, _SIZE, _SIZE, _POINTER,
    ]  # fmt: skip
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


def _write_kv(
    library: ctypes.CDLL,
) -> Callable[[KVLayer, Tensor, Tensor, Tensor | None], None]:
    function = library.afd_write_rows
    function.argtypes = [
        _POINTER, _SIZE, _POINTER, _SIZE, _SIZE, _SIZE, _POINTER, _SIZE, _FLAG,
    ]  # fmt: skip
    function.restype = None

    def write_kv(layer: KVLayer, slots: Tensor, keys: Tensor, values: Tensor | None) -> None:
        for rows, blocks in ((keys, layer.keys), (values, layer.values)):
            if rows is None:
                continue
            rows = _heads_together(rows)
            function(
                rows.data_ptr(),
                rows.stride(0),
                slots.data_ptr(),
                *rows.shape,
                blocks.data_ptr(),
                blocks.shape[2],
                _KV_FORMATS[blocks.dtype],
            )

    return write_kv


def _rope_write_kv(
    library: ctypes.CDLL,
) -> Callable[[Tensor, int, Tensor, Tensor, Tensor, KVLayer], Tensor]:
    function = library.afd_rope_write_kv
    function.argtypes = [
        _POINTER, _SIZE, _SIZE, _SIZE, _SIZE, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER,
        _SIZE, _FLAG, _POINTER,
    ]  # fmt: skip
    function.restype = None

    def rope_write_kv(
        qkv: Tensor, num_heads: int, table: Tensor, positions: Tensor, slots: Tensor, layer: KVLayer
    ) -> Tensor:
        num_kv_heads, block_size = layer.keys.shape[1:3]
        head_dim = table.shape[-1]
        qkv, query = qkv.contiguous(), torch.empty(qkv.shape[0], num_heads, head_dim)
        function(
            qkv.data_ptr(),
            qkv.shape[0],
            num_heads,
            num_kv_heads,
            head_dim,
            table.data_ptr(),
            positions.data_ptr(),
            slots.data_ptr(),
            layer.keys.data_ptr(),
            layer.values.data_ptr(),
            block_size,
            _KV_FORMATS[layer.keys.dtype],
            query.data_ptr(),
        )
        return query

    return rope_write_kv


def _argmax(library: ctypes.CDLL) -> Callable[[Tensor], int]:
    function = library.afd_argmax
    function.argtypes = [_POINTER, _SIZE]
    function.restype = _SIZE

    def argmax(logits: Tensor) -> int:
        logits = logits.contiguous()
        return int(function(logits.data_ptr(), logits.shape[0]))

    return argmax


def _gumbel_argmax(
    library: ctypes.CDLL,
) -> Callable[[Tensor, Tensor | None, float, int], int]:
    function = library.afd_gumbel_argmax
    function.argtypes = [_POINTER, _SIZE, _POINTER, _SIZE, _DOUBLE, ctypes.c_uint64]
    function.restype = _SIZE

    def gumbel_argmax(logits: Tensor, ids: Tensor | None, temperature: float, key: int) -> int:
        logits = logits.contiguous()
        chosen, count = (None, 0) if ids is None else (ids.data_ptr(), ids.shape[0])
        token = function(logits.data_ptr(), logits.shape[0], chosen, count, temperature, key)
        return int(token)

    return gumbel_argmax


def _select(library: ctypes.CDLL) -> Callable[[Tensor, float, int, float, float], Tensor]:
    function = library.afd_select
    function.argtypes = [_POINTER, _SIZE, _DOUBLE, _SIZE, _DOUBLE, _DOUBLE, _POINTER]
    function.restype = _SIZE

    def select(
        logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
    ) -> Tensor:
        logits, ids = logits.contiguous(), torch.empty(logits.shape[0], dtype=torch.int64)
        count = function(
            logits.data_ptr(),
            logits.shape[0],
            temperature,
            top_k,
            top_p,
            min_p,
            ids.data_ptr(),
        )
        return ids[:count]

    return select


def _heads_together(x: Tensor) -> Tensor:
    """Return [rows, heads, head_dim] with each row's heads in one run; rows may lie apart."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
