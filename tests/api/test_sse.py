import json

import pytest

from afd_server.api import sse


def test_an_event_is_one_data_line_and_an_empty_one():
    assert sse.event("x") == sse.event(b"x") == b"data: x\n\n"


def test_an_event_may_have_a_name():
    assert sse.json_event({"a": 1}, "ping") == b'event: ping\ndata: {"a":1}\n\n'


def test_an_event_of_several_lines_is_a_bug_of_ours():
    with pytest.raises(AssertionError, match="single line"):
        sse.event("a\nb")


def test_a_chunk_is_compact_utf8_and_stays_on_its_line():
    raw = sse.json_event({"text": "zwölf\r\n\u2028😀", "n": None})
    assert raw.startswith('data: {"text":"zwölf\\r\\n'.encode())
    assert raw.count(b"\n") == 2
    assert json.loads(raw[6:]) == {"text": "zwölf\r\n\u2028😀", "n": None}


def test_the_end_and_the_keep_alive_are_what_clients_expect():
    assert sse.DONE == b"data: [DONE]\n\n"
    assert sse.KEEP_ALIVE.startswith(b":") and sse.KEEP_ALIVE.endswith(b"\n\n")
