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
PRODUCTS, HEADS = [(576, 96), (96, 576)], [(9, 3, 64, None), (8, 1, 32, 70)]


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda kernels: kernels.name)
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_our_kernels_pass(kernels, kv_dtype):
    check_rows(kernels, PRODUCTS, HEADS, kv_dtype)


def test_a_product_whose_bits_depend_on_the_batch_is_found():
    def linear(x, weight):
        return REFERENCE.linear(x, weight) * (1 + 2**-20 * (x.shape[0] == 7))

    with pytest.raises(ConfigError, match="product 96 x 112 gives a row other bits among 7 rows"):
        check_rows(replace(REFERENCE, linear=linear), PRODUCTS, HEADS, torch.float32)


@pytest.mark.parametrize("least", [40, 100])
def test_so_is_one_that_takes_another_path_from_many_rows_on(least):
    def linear(x, weight):
        return REFERENCE.linear(x, weight) * (1 + 2**-20 * (x.shape[0] >= least))

    with pytest.raises(ConfigError, match="product"):
        check_rows(replace(REFERENCE, linear=linear), PRODUCTS, [], torch.float32)


def test_so_is_one_that_is_wrong_in_the_models_own_columns():
    def linear(x, weight):
        is_wide = weight.shape[0] == 700
        return REFERENCE.linear(x, weight) * (1 + 2**-20 * (x.shape[0] == 48 and is_wide))

    with pytest.raises(ConfigError, match="product 96 x 700 gives a row other bits among 48 rows"):
        check_rows(replace(REFERENCE, linear=linear), [(96, 700)], [], torch.float32)


def check_attention(changed, heads):
    """Try an attention to which `changed(rows, window)` adds a bit where it is true."""

    def attention(query, layer, rows, window=None):
        return REFERENCE.paged_attention(query, layer, rows, window) + 1e-6 * changed(rows, window)

    broken = replace(REFERENCE, paged_attention=attention)
    check_rows(broken, [], heads, torch.float32)


def test_so_is_an_attention():
    with pytest.raises(ConfigError, match="heads of 64 gives a row other bits among 2 rows"):
        check_attention(lambda rows, _: rows.num_keys.shape[0] == 2, HEADS)


@pytest.mark.parametrize("last", [64, 190])
def test_so_is_one_that_is_wrong_behind_a_span_of_keys(last):
    def changed(rows, _):
        return (rows.num_keys > last).unsqueeze(1) * (rows.num_keys.shape[0] % 16 == 5)

    with pytest.raises(ConfigError, match="heads of 64"):
        check_attention(changed, HEADS)


def test_so_is_one_that_is_wrong_with_a_window():
    with pytest.raises(ConfigError, match="heads of 32 gives a row other bits among 3 rows"):
        check_attention(lambda rows, window: window is not None and len(rows.num_keys) == 3, HEADS)
    check_attention(lambda *_: False, [(9, 3, 64, 4096)])
