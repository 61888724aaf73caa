"""Traces in Mooncake's form, and what is said of others."""

import json

import pytest

from afd_server.core.errors import ConfigError
from afd_server.workload.trace import TraceEntry, parse_trace


def line(**changes):
    good = {"timestamp": 27482, "input_length": 1025, "output_length": 52, "hash_ids": [46, 47, 2]}
    return json.dumps(good | changes)


def test_a_line_is_a_request_and_fields_of_others_are_passed_over():
    lines = [line(), "", line(timestamp=30000.5, hash_ids=[], session="x")]
    assert parse_trace(lines, 512, "t") == [
        TraceEntry(27.482, 1025, 52, (46, 47, 2)), TraceEntry(30.0005, 1025, 52)
    ]  # fmt: skip


def test_hash_ids_may_be_missing():
    text = '{"timestamp": 0, "input_length": 1, "output_length": 1}'
    assert parse_trace([text], 512, "t") == [TraceEntry(0.0, 1, 1)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("[1]", "no JSON object"),
        (line(timestamp=-1), "timestamp is -1, must be milliseconds from 0"),
        (line(timestamp="now"), "timestamp is 'now'"),
        (line(timestamp=True), "timestamp is True"),
        (line(timestamp=1), "timestamp is before that of the line above"),
        (line(input_length=0), "input_length is 0, must be a whole number of at least 1"),
        (line(output_length=None), "output_length is None"),
        (line(output_length=1.5), "output_length is 1.5"),
        (line(hash_ids=3), "hash_ids is 3, must be a list of whole numbers"),
        (line(hash_ids=["a"]), r"hash_ids is \['a'\]"),
        (line(hash_ids=[1, 2, 3, 4]), "4 hash_ids, but 1025 tokens are 3 blocks of 512"),
    ],
)
def test_a_wrong_line_is_named_with_its_field(text, says):
    with pytest.raises(ConfigError, match=f"trace.jsonl line 2: .*{says}"):
        parse_trace([line(), text], 512, "trace.jsonl")


def test_a_trace_without_requests_is_none():
    with pytest.raises(ConfigError, match=r"trace.jsonl has no requests"):
        parse_trace(["\n"], 512, "trace.jsonl")
