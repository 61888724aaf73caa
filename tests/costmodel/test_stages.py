"""Estimated stages follow the model's shapes; the demo model's agree with what was measured."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd_server.core.attention_spec import GQASpec, MFASpec, MLASpec, RopeSpec
from afd_server.core.expert_spec import ExpertSpec
from afd_server.core.model_spec import ModelSpec
from afd_server.costmodel.stages import RATES, attention_weights, estimate_stages

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "kernels.json"
ROPE = RopeSpec(64, 10000.0)
GQA = GQASpec(9, 3, 64, ROPE)
DEMO = ModelSpec("llama", 576, (GQA,) * 30, 1536, 49152, 8192, 1e-5, True, (2,))


def routed(num_experts, num_chosen, intermediate_size):
    experts = ExpertSpec(num_experts, num_chosen, intermediate_size, True, (True,) * 30)
    return replace(DEMO, experts=experts)


def estimate(spec=DEMO, weights="int8", rows=16, context=256):
    return estimate_stages(spec, weights, "bfloat16", rows, context)


def kernels():
    return json.loads(RESULTS.read_text("utf-8"))["results"]


@pytest.mark.parametrize("rows", [1, 4, 16, 32])
def test_the_demo_models_stages_are_what_its_kernels_were_measured_to_take(rows):
    us = {name: got["us"] for name, got in kernels().items() if "us" in got}
    products = {name: us[f"int8 {name} {rows}"] for name in ("qkv", "o", "gate_up", "down")}
    head = us[f"int8 lm_head {rows}"] / 30
    attend = us["attention bfloat16 16 x 256, 1 rows"] / 16 * rows
    times = estimate(rows=rows)
    ffn = products["gate_up"] + products["down"]
    assert times.ffn_s * 1e6 == pytest.approx(ffn, rel=0.2)
    attention = products["qkv"] + products["o"] + head + attend
    assert times.attention_s * 1e6 == pytest.approx(attention, rel=0.25)


@given(st.sampled_from(list(RATES)), st.integers(1, 64), st.integers(1, 4096))
def test_more_rows_and_longer_contexts_never_take_less(weights, rows, context):
    times = estimate(DEMO, weights, rows, context)
    more = estimate(DEMO, weights, rows + 1, context)
    longer = estimate(DEMO, weights, rows, context + 1)
    assert times.attention_s <= more.attention_s
    assert times.ffn_s <= more.ffn_s == estimate(DEMO, weights, rows + 1, context + 1).ffn_s
    assert times.attention_s < longer.attention_s


@given(st.integers(1, 64))
def test_experts_that_everybody_chooses_are_a_wider_dense_ffn(rows):
    dense = replace(DEMO, intermediate_size=4 * 512)
    assert estimate(routed(4, 4, 512), rows=rows).ffn_s == pytest.approx(
        estimate(dense, rows=rows).ffn_s
    )


def test_an_ffn_half_counts_the_chosen_experts():
    one_row = [estimate(routed(64, chosen, 512), rows=1).ffn_s for chosen in (1, 2, 8)]
    assert one_row == pytest.approx([one_row[0], 2 * one_row[0], 8 * one_row[0]])
    # few rows choose different experts, each of which is read for one of them
    assert estimate(routed(64, 2, 512), rows=4).ffn_s > 3.8 * one_row[1]


def test_layers_without_experts_are_dense():
    experts = ExpertSpec(64, 2, 512, True, (False,) * 30)
    assert estimate(replace(DEMO, experts=experts)) == estimate()


def test_a_window_limits_what_is_attended_to():
    windowed = replace(DEMO, attention=(replace(GQA, window=128),) * 30)
    assert estimate(windowed, context=4096) == estimate(context=128)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (GQA, 576 * 576 + 2 * 576 * 192 + 576 * 576),
        (MFASpec(8, 32, 48, ROPE, False), 576 * (48 + 64) + 48 * 256 + 256 * 576),
        (MFASpec(8, 32, 48, ROPE, True), 576 * (48 + 32) + 48 * 256 + 256 * 576),
        (
            MLASpec(8, 96, 64, 32, 24, RopeSpec(16, 1e4), 1.0),
            576 * (96 + 64 + 16) + 96 * 8 * (32 + 16) + 8 * 64 * (32 + 24) + 8 * 24 * 576,
        ),
    ],
)
def test_every_kind_of_attention_counts_its_projections(layer, expected):
    assert attention_weights(layer, 576) == expected
