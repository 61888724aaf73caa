"""The self-test passes on every kernel we ship and fails on one that minds its company."""

from dataclasses import replace

import pytest
import torch

from afd_server.core.errors import ConfigError
from afd_server.kernels.cpu import available_builds, native_kernels
from afd_server.kernels.reference import REFERENCE, reference
from afd_server.kernels.selftest import check_rows

KERNELS = [
    REFERENCE,
    reference(torch.bfloat16),
    *(native_kernels(w, b) for b in available_builds() for w in ("int8", "float32", "bfloat16")),
]
PRODUCTS, HEADS = [(576, 96), (96, 576)], [(9, 3, 64), (8, 1, 32)]


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda kernels: kernels.name)
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_our_kernels_pass(kernels, kv_dtype):
    check_rows(kernels, PRODUCTS, HEADS, kv_dtype)


def test_a_product_whose_bits_depend_on_the_batch_is_found():
    def linear(x, weight):
        return REFERENCE.linear(x, weight) * (1 + 2**-20 * (x.shape[0] == 7))

    with pytest.raises(ConfigError, match="product 576 x 96 gives a row other bits among 7 rows"):
        check_rows(replace(REFERENCE, linear=linear), PRODUCTS, HEADS, torch.float32)


def test_so_is_such_an_attention():
    def attention(query, layer, rows):
        out = REFERENCE.paged_attention(query, layer, rows)
        return out + 1e-6 * (query.shape[0] == 2)

    broken = replace(REFERENCE, paged_attention=attention)
    with pytest.raises(ConfigError, match="heads of 64 gives a row other bits among 2 rows"):
        check_rows(broken, PRODUCTS, HEADS, torch.float32)
