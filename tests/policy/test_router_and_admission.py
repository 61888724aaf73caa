import pytest

from afd_server.core.errors import InvalidRequest, Overloaded
from afd_server.core.topology import Member, Role
from afd_server.policy.admission import AdmissionConfig, check_capacity, fit_max_tokens
from afd_server.policy.router import choose_worker

WORKERS = [Member(Role.ATTENTION, slot, f"i{slot}", "ipc://x", "f") for slot in range(3)]
LIMITS = AdmissionConfig(max_live_requests=4, max_model_len=100)


def test_the_least_loaded_worker_is_chosen_and_the_lowest_slot_among_equals():
    assert choose_worker(WORKERS, {"i0": 5, "i1": 2, "i2": 2}) is WORKERS[1]


def test_without_workers_there_is_no_choice():
    assert choose_worker([], {}) is None


def test_a_full_gateway_refuses_and_says_when_to_come_back():
    check_capacity(LIMITS, num_live=2, num_new=2)
    with pytest.raises(Overloaded, match="limit is 4") as refusal:
        check_capacity(LIMITS, num_live=3, num_new=2)
    assert refusal.value.retry_after_s > 0


def test_max_tokens_defaults_to_what_the_context_leaves():
    assert fit_max_tokens(LIMITS, 30, None) == 70
    assert fit_max_tokens(LIMITS, 30, 70) == 70


@pytest.mark.parametrize(
    ("prompt", "wanted", "param"), [(100, 1, "prompt"), (30, 71, "max_tokens")]
)
def test_what_does_not_fit_the_context_is_refused_by_name(prompt, wanted, param):
    with pytest.raises(InvalidRequest) as refusal:
        fit_max_tokens(LIMITS, prompt, wanted)
    assert refusal.value.param == param
