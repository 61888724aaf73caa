"""Numbers that a server finds for itself: of lanes, and of the workers of either pool."""

import os
import re

import pytest

from support.checkpoints import tiny_llama
from support.experts import tiny_routed
from support.server import run_cli, serving

CORES = len(os.sched_getaffinity(0))
THREADS = max(1, CORES // 2)  # so that a large machine does not start a worker for each core
NUM_WORKERS = CORES // THREADS
AUTO = ("--launcher", "local", "--log-level", "info", "--compute-threads", THREADS)
BODY = {"prompt": [[5, 6, 7, 8, 9]], "max_tokens": 8, "temperature": 0, "return_token_ids": True}


def tokens_of(server):
    return server.http.post("/v1/completions", json=BODY).json()["choices"][0]["token_ids"]


def test_a_server_left_to_itself_starts_answers_and_says_what_it_chose(short_dir):
    chosen = ("--attention-workers", "auto", "--ffn-workers", "auto")
    with serving(short_dir, tiny_llama()[0], *AUTO, *chosen) as server:
        got = tokens_of(server)
        num_attention, num_ffn = map(int, re.fullmatch(r"(\d+)A(\d+)F", server.topology).groups())
        assert num_attention + num_ffn == max(2, NUM_WORKERS)
        plan = f"{CORES} cores: {num_attention} attention and {num_ffn} FFN workers, because"
        assert plan in server.output
        # said before the server was ready
        assert server.output.count(" streams through a layer as ") == num_attention
        assert server.wait_for(server.all_blocks_free)
    with serving(short_dir, tiny_llama()[0], *AUTO, "--lanes", 2) as server:
        assert tokens_of(server) == got
        assert " streams through a layer as " not in server.output


def test_colocated_workers_may_be_as_many_as_there_are_cores(short_dir):
    chosen = ("--attention-workers", "auto", "--ffn-workers", 0)
    with serving(short_dir, tiny_llama()[0], *AUTO, *chosen) as server:
        assert server.topology == f"{NUM_WORKERS}A0F"
        assert f"{CORES} cores: {NUM_WORKERS} colocated attention workers" in server.output


@pytest.mark.skipif(CORES < 2, reason="two workers need two cores of their own")
def test_pinned_workers_have_cores_of_their_own_and_the_gateway_has_all(short_dir):
    arguments = ("--launcher", "local", "--pin-workers")
    with serving(short_dir, tiny_llama()[0], *arguments) as server:
        assert tokens_of(server)
        started = [(process.cmdline(), process.cpu_affinity()) for process in server.descendants()]
    pinned = [cores for command, cores in started if "worker" in command]
    others = [cores for command, cores in started if "gateway" in command]
    assert list(map(len, pinned)) == [1, 1] and pinned[0] != pinned[1]
    assert list(map(len, others)) == [CORES]


@pytest.mark.slow
def test_an_ffn_pool_of_groups_has_as_many_workers_as_they_need(short_dir):
    chosen = ("--ffn-workers", "auto", "--ffn-parallel", "hybrid", "--expert-replicas", 2)
    with serving(short_dir, tiny_routed("mixtral")[0], *AUTO, *chosen) as server:
        assert server.topology == "1A4F"  # two groups of two shards are the least there can be


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--attention-workers", "0", "--ffn-workers", "auto"], "attention_workers is 0"),
        (["--attention-workers", "-1"], "attention_workers is -1"),
        (
            ["--pin-workers", "--attention-workers", CORES],
            f"{CORES + 1} workers of {THREADS} compute_threads want",
        ),
        (
            ["--pin-workers", "--ray-address", "10.0.0.1:6379", "--launcher", "ray"],
            "pin_workers gives out the cores of this machine",
        ),
        (["--ffn-workers", "most"], "ffn_workers is 'most' (command line)"),
        (
            ["--ffn-workers", "auto", "--ray-address", "10.0.0.1:6379", "--launcher", "ray"],
            "ffn_workers is auto, which counts the cores of this machine",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(short_dir, arguments, words):
    done = run_cli(short_dir, "serve", tiny_llama()[0], "--port", "0", *arguments)
    assert done.returncode == 2
    assert words in done.stderr
