"""Stage times estimated from a model's shapes, before any worker runs.

Knows weights, keys and values, the bulk of what is read and multiplied. Norms and messages, which
cost either half about the same, are left out.
"""

from dataclasses import dataclass

from afd_server.core.attention_spec import AttentionSpec, GQASpec, KVFormat, MFASpec
from afd_server.core.model_spec import ModelSpec
from afd_server.costmodel.pipeline import StageTimes


@dataclass(frozen=True, slots=True)
class Rates:
    """What one core does in a second where nothing else limits it.

    Attributes:
        weight_bytes_s: read from memory by a product of few rows.
        macs_s: multiply-adds of a product of 16 to 32 rows.
    """

    weight_bytes_s: float
    macs_s: float


# One Zen 5 core, benchmarks/results/kernels.json (benchmarks/kernels/micro.py): `gate_up` and
# `down` with 1 to 8 rows, and with 16 and 32. Float32 weights are taken for bfloat16 ones.
RATES = {
    "int8": Rates(31e9, 280e9),
    "bfloat16": Rates(25e9, 45e9),
    "float32": Rates(25e9, 45e9),
}
WEIGHT_BYTES = {"int8": 1 + 4 / 64, "bfloat16": 2.0, "float32": 4.0}  # int8: a scale for 64
KV_RATES = Rates(18e9, 40e9)  # attention of 16 and 32 sequences: of bfloat16 keys; of int8 keys


def estimate_stages(
    spec: ModelSpec, weights: str, kv_format: KVFormat, rows: int, context: int
) -> StageTimes:
    """Estimate what a micro-batch takes one core of either half, in the mean layer.

    Args:
        spec: of the model.
        weights: `int8`, `bfloat16` or `float32`.
        kv_format: of keys and values.
        rows: of the micro-batch, each of another sequence.
        context: tokens that each row attends to.
    """
    layers = range(spec.num_layers)
    head = _product_s(spec.hidden_size * spec.vocab_size, rows, weights)
    attention = [
        _product_s(attention_weights(layer, spec.hidden_size), rows, weights)
        + _attend_s(layer, kv_format, rows, context)
        for layer in spec.attention
    ]
    ffn = [_ffn_s(spec, layer, rows, weights) for layer in layers]
    num_layers = spec.num_layers
    return StageTimes((head + sum(attention)) / num_layers, sum(ffn) / num_layers, 0.0)


def attention_weights(layer: AttentionSpec, hidden_size: int) -> int:
    """Return the elements of a layer's projections, as they are multiplied by."""
    return sum(width * columns for width, columns in attention_products(layer, hidden_size))


def attention_products(layer: AttentionSpec, hidden_size: int) -> list[tuple[int, int]]:
    """Return (in, out) of a layer's projections, as they are multiplied by."""
    kv, heads = layer.kv, layer.num_heads
    match layer:
        case GQASpec():
            width = heads * layer.head_dim
            return [(hidden_size, width + kv.elements), (width, hidden_size)]
        case MFASpec():
            rank, width = layer.query_rank, heads * layer.head_dim
            return [(hidden_size, rank + kv.elements), (rank, width), (width, hidden_size)]
        case _:  # absorbed: a head's keys meet its query, its values come behind the sum
            rank, latent = layer.query_rank, layer.latent_dim
            return [
                (hidden_size, rank + kv.elements),
                (rank, heads * (layer.plain_dim + layer.rope.dim)),
                *[(layer.plain_dim, latent), (latent, layer.value_dim)] * heads,
                (heads * layer.value_dim, hidden_size),
            ]


def _attend_s(layer: AttentionSpec, kv_format: KVFormat, rows: int, context: int) -> float:
    """Return what scores and sums over the cached tokens take."""
    window = layer.window if isinstance(layer, GQASpec) else None
    tokens = rows * min(context, window or context)
    macs = tokens * layer.num_heads * (layer.kv.key_dim + layer.kv.value_dim)
    num_bytes = tokens * layer.kv.num_bytes(kv_format)
    return max(num_bytes / KV_RATES.weight_bytes_s, macs / KV_RATES.macs_s)


def _ffn_s(spec: ModelSpec, layer: int, rows: int, weights: str) -> float:
    experts = spec.experts
    if experts is None or not experts.is_routed[layer]:
        return _product_s(3 * spec.hidden_size * spec.intermediate_size, rows, weights)
    # of experts chosen evenly, those that any row chose are read, each for its share of the rows
    num_read = experts.num_experts * (1 - (1 - experts.num_chosen / experts.num_experts) ** rows)
    one = 3 * spec.hidden_size * experts.intermediate_size
    shared = 3 * spec.hidden_size * (experts.shared_size or 0)
    chosen_s = num_read * _product_s(one, rows * experts.num_chosen / num_read, weights)
    return chosen_s + _product_s(shared, rows, weights)


def _product_s(num_weights: int, rows: float, weights: str) -> float:
    """Return what a product takes: to read its weights, or to multiply if that is longer."""
    rates = RATES[weights]
    return max(
        num_weights * WEIGHT_BYTES[weights] / rates.weight_bytes_s,
        num_weights * rows / rates.macs_s,
    )
