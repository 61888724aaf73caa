"""Flags become settings; wrong ones are named."""

import argparse
import re
from math import inf
from pathlib import Path

import pytest

from afd_server.core.errors import ConfigError
from afd_server.core.request import SLO
from afd_server.loadgen.config import BenchConfig, add_bench_flags, bench_config
from afd_server.workload.lengths import UniformLengths
from afd_server.workload.offers import Clients


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_bench_flags(parser)
    return bench_config(vars(parser.parse_args(arguments)))


def test_every_flag_is_documented_and_no_other():
    parser = argparse.ArgumentParser(add_help=False)
    add_bench_flags(parser)
    page = Path(__file__).parents[2] / "docs" / "benchmarking.md"
    documented = set(re.findall(r"--[a-z][a-z-]+", page.read_text("utf-8")))
    assert documented == set(re.findall(r"--[a-z][a-z-]+", parser.format_usage()))


def test_without_flags_there_are_the_defaults():
    assert parse() == BenchConfig()


def test_flags_are_read():
    config = parse(
        "--request-rate", "1,2.5,inf", "--max-concurrency", "8,16", "--burstiness", "inf",
        "--input-len", "64:256", "--token-ids", "3:258", "--slo-mix", "20:1",
        "--cancel-share", "0.1", "--ttft-slo-ms", "500", "--extra-body", '{"top_k": null}',
    )  # fmt: skip
    assert config.request_rate == (1.0, 2.5, inf)
    assert config.max_concurrency == (8, 16)
    assert config.burstiness == inf
    assert config.input_len == UniformLengths(64, 256)
    assert config.vocabulary == range(3, 259)
    assert parse("--token-ids", "0:100").vocabulary == range(101)
    assert config.clients == Clients(((0.02, 1.0),), 0.1)
    assert config.slo == SLO(0.5, 0.05)
    assert config.extra_body == {"top_k": None}


def test_a_trace_keeps_its_own_rate_unless_told():
    assert parse("--trace", "t").request_rate == (None,)
    assert parse("--trace", "t", "--request-rate", "2").request_rate == (2.0,)


def test_a_search_of_a_trace_and_a_sweep_with_a_finite_rate_have_a_duration():
    assert parse("--trace", "t", "--find-goodput", "--duration-s", "9").duration_s == 9.0
    assert parse("--request-rate", "1,inf", "--duration-s", "9").duration_s == 9.0


def test_only_a_trace_has_a_rate_of_its_own():
    with pytest.raises(ConfigError, match="request_rate is None"):
        BenchConfig(request_rate=(None,))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--request-rate", "1,0"], "request_rate is 0.0, must be above 0 or inf"),
        (["--request-rate", "1,x"], "request_rate is '1,x'; write numbers"),
        (["--request-rate", "nan"], "request_rate is 'nan'"),
        (["--max-concurrency", "8,0"], "max_concurrency is 0, must be at least 1"),
        (["--max-concurrency", "1.5"], "max_concurrency is '1.5'"),
        (["--burstiness", "0"], "burstiness is 0.0, must be at least 0.01"),
        (["--burstiness", "nan"], "burstiness is nan"),
        (["--duration-s", "0"], "duration_s is"),
        (["--duration-s", "inf"], "duration_s is inf, must be above 0 and finite"),
        (["--duration-s", "9", "--request-rate", "inf"], "duration_s has no .*: say with num_prom"),
        (["--duration-s", "9", "--trace", "t"], "duration_s has no effect on a trace"),
        (["--num-prompts", "0"], "num_prompts is 0, must be at least 1"),
        (["--ttft-slo-ms", "inf"], "ttft_slo_ms is inf, must be above 0 and finite"),
        (["--tpot-slo-ms", "inf"], "tpot_slo_ms is inf"),
        (["--prefix-len", "-1"], "prefix_len is -1, must be at least 0"),
        (["--cancel-share", "2"], "cancel_share is 2.0, must be in 0 … 1"),
        (["--cancel-after-s", "0"], "cancel_after_s is 0.0"),
        (["--cancel-after-s", "inf"], "cancel_after_s is inf, must be above 0 and finite"),
        (["--input-len", "x"], "input_len is 'x'"),
        (["--token-ids", "lognormal:1:1:2"], "token_ids is 'lognormal:1:1:2', must be LOW:HIGH"),
        (["--token-ids=-1:9"], "token_ids is '-1:9'"),
        (["--token-ids", "9:8"], "token_ids is '9:8'"),
        (["--slo-mix", "x"], "slo_mix is 'x'"),
        (["--extra-body", "{"], "extra_body is '{': not JSON"),
        (["--extra-body", "[]"], r"extra_body is '\[\]', must be a JSON object"),
        (["--trace", "t", "--input-len", "9"], "input_len cannot be given with trace"),
        (["--find-goodput", "--request-rate", "1,2"], "takes one request_rate"),
        (["--find-goodput", "--request-rate", "inf"], "to begin with, not inf"),
        (["--find-goodput", "--num-prompts", "9"], "goes by duration_s"),
    ],
)
def test_wrong_values_are_named(arguments, says):
    with pytest.raises(ConfigError, match=says):
        parse(*arguments)
