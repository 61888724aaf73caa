"""Whose a request is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from afd_server.core.errors import InvalidRequest
from afd_server.core.request import SLO
from afd_server.gateway.asker import api_key, check_given_once, targets_of, tenant_salt

SECRET = bytes(16)
maybe_text = st.none() | st.text()


@given(maybe_text, maybe_text, maybe_text, maybe_text)
def test_only_the_same_key_with_the_same_cache_salt_gives_the_same_salt(key, salt, key_2, salt_2):
    equal = tenant_salt(SECRET, key, salt) == tenant_salt(SECRET, key_2, salt_2)
    assert equal == ((key, salt) == (key_2, salt_2))


def test_a_cache_salt_cannot_stand_for_another_ones_api_key():
    salts = {
        tenant_salt(SECRET, "Bearer a", None),
        tenant_salt(SECRET, None, "Bearer a"),
        tenant_salt(SECRET, "Bearer a", "b"),
        tenant_salt(SECRET, 'Bearer a", "b', None),
        tenant_salt(SECRET, "", ""),
        tenant_salt(SECRET, None, None),
    }
    assert len(salts) == 6


def test_a_salt_says_nothing_of_the_api_key_to_those_without_the_secret():
    salt = tenant_salt(SECRET, "Bearer sk-1", None)
    assert salt != tenant_salt(bytes(15) + b"\1", "Bearer sk-1", None)
    assert "sk-1" not in salt
    assert len(salt) == 32


def test_a_lone_surrogate_is_a_cache_salt_like_any_other():
    assert tenant_salt(SECRET, None, "\ud800") != tenant_salt(SECRET, None, "\ud801")


def test_a_key_is_the_same_in_the_header_of_either_dialect():
    assert api_key({"x-api-key": "k"}) == api_key({"authorization": "Bearer k"}) == "Bearer k"
    assert api_key({}) is None


def test_a_second_key_beside_an_authorization_makes_no_other_tenant():
    assert api_key({"authorization": "Bearer a", "x-api-key": "b"}) == "Bearer a"


def test_a_target_that_is_given_twice_is_refused_by_name():
    name, value = b"x-slo-tpot-ms", b"20"
    check_given_once(Headers(raw=[(name, value), (b"accept", b"a"), (b"accept", b"b")]))
    with pytest.raises(InvalidRequest, match="more than once") as refusal:
        check_given_once(Headers(raw=[(name, value), (name, value)]))
    assert refusal.value.param == name.decode()


def test_a_target_is_shown_in_part_if_it_is_long():
    with pytest.raises(InvalidRequest) as refusal:
        targets_of({"x-slo-tpot-ms": "9" * 5000}, DEFAULT)
    assert len(str(refusal.value)) < 150


DEFAULT = SLO(ttft_s=4.0, tpot_s=0.05)


def test_targets_are_those_of_the_headers_and_else_the_servers():
    assert targets_of({}, DEFAULT) == DEFAULT
    assert targets_of({"x-slo-tpot-ms": "20"}, DEFAULT) == SLO(4.0, 0.02)
    both = {"x-slo-ttft-ms": "1500.5", "x-slo-tpot-ms": "1e2"}
    assert targets_of(both, DEFAULT) == SLO(1.5005, 0.1)


@pytest.mark.parametrize("name", ["x-slo-ttft-ms", "x-slo-tpot-ms"])
@pytest.mark.parametrize("text", ["", "0", "-5", "fast", "nan", "inf", "3600001", "50ms", "1_000"])
def test_a_target_that_is_no_number_of_milliseconds_is_refused_by_name(name, text):
    with pytest.raises(InvalidRequest, match="expected milliseconds") as refusal:
        targets_of({name: text}, DEFAULT)
    assert refusal.value.param == name
