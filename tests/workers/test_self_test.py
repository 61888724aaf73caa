"""What a worker tries its kernels with before it says that it is ready."""

from dataclasses import replace

from afd_server.core.attention_spec import GQASpec, RopeSpec
from afd_server.core.model_spec import ModelSpec
from afd_server.core.topology import Role
from afd_server.kernels.reference import REFERENCE
from afd_server.workers.config import WorkerSpec
from afd_server.workers.runtime import _self_test
from support.checkpoints import tiny_llama
from support.pools import Pools

ATTENTION = GQASpec(6, 2, 16, RopeSpec(16, 1e4))
LAYERS = (ATTENTION, replace(ATTENTION, window=70), ATTENTION)
MODEL = ModelSpec("llama", 80, LAYERS, 384, 1000, 512, 1e-5, True, (2,))


def tried(role, num_ffn):
    """Return the (in, out) of all products, and the (query heads, window) of all attentions."""
    template = Pools(tiny_llama()[0], num_ffn=num_ffn)._template
    spec = WorkerSpec(role=role, slot=num_ffn - 1, incarnation="i", **template)
    products, attentions = set(), set()

    def pack(weight):
        products.add((weight.shape[1], weight.shape[0]))
        return weight

    def attend(query, layer, rows, window=None):
        attentions.add((query.shape[1], window))
        return REFERENCE.paged_attention(query, layer, rows, window)

    _self_test(spec, replace(REFERENCE, pack=pack, paged_attention=attend), MODEL)
    return {product for product in products if product[1] != 112}, attentions


def test_a_worker_tries_its_kernels_on_the_models_shapes():
    around = {(80, 6 * 16 + 2 * 2 * 16), (6 * 16, 80), (80, 512)}
    whole = around | {(80, 768), (384, 80)}
    assert tried(Role.ATTENTION, 2) == (whole, {(6, None), (6, 70)})
    assert tried(Role.FFN, 2) == (around | {(80, 384), (192, 80)}, {(6, None), (6, 70)})
