"""Many requests, and more than fits: nothing leaks and nothing gets stuck."""

import asyncio

import httpx
import psutil
import pytest

from support.checkpoints import tiny_llama
from support.server import serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SETTINGS = (tiny_llama()[0], "--launcher", "local", "--kv-cache-mb", 1)  # 85 blocks of 16 tokens
NUM_CLIENTS = 32
NUM_WARM_UP, NUM_REQUESTS = 1_000, 10_000
TIMELINE_BYTES = 16 * 2**20  # the gateway fills its last 30 s of timeline only during the run
MOST_GROWTH_BYTES = 4 * 2**20  # of a process: 0.4 KiB a request, less than a journal entry


def short(number):
    """Return one of many short requests; some begin alike, none takes more than four blocks."""
    prompt = [3 + number % 5] * 20 + [3 + number % 250] * (number % 30)
    return {"prompt": [prompt], "max_tokens": 1 + number % 2, "ignore_eos": True, "seed": number}


def ask_all(server, bodies):
    """Send every request over a few connections, and return the answers in order."""

    async def ask():
        limits = httpx.Limits(max_connections=NUM_CLIENTS)
        answers = [None] * len(bodies)
        todo = iter(enumerate(bodies))
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as http:

            async def client():
                for place, body in todo:
                    answers[place] = await http.post("/v1/completions", json=body)

            await asyncio.gather(*(client() for _ in range(NUM_CLIENTS)))
        return answers

    return asyncio.run(ask())


def processes(server):
    return [psutil.Process(server.process.pid), *server.descendants()]


def idle_facts(server):
    """Wait until nothing is under way; return RSS, descriptors and threads of each process."""
    server.wait_for(server.all_blocks_free)
    server.wait_for(lambda: server.status()["live_requests"] == 0)
    return {p.pid: (p.memory_info().rss, p.num_fds(), p.num_threads()) for p in processes(server)}


def test_ten_thousand_short_requests_leave_no_memory_sockets_or_blocks_behind(short_dir):
    with serving(short_dir, *SETTINGS) as server:
        ask_all(server, [short(number) for number in range(NUM_WARM_UP)])
        before = idle_facts(server)
        answers = ask_all(server, [short(number) for number in range(NUM_REQUESTS)])
        assert {answer.status_code for answer in answers} == {200}
        after = idle_facts(server)
        assert after.keys() == before.keys(), "a process was replaced"
        for pid, (rss, num_fds, num_threads) in after.items():
            command = psutil.Process(pid).cmdline()
            allowed = MOST_GROWTH_BYTES + ("gateway" in command) * TIMELINE_BYTES
            assert rss - before[pid][0] < allowed, command
            assert num_fds <= before[pid][1] + 2, psutil.Process(pid).cmdline()
            assert num_threads <= before[pid][2]
        assert server.http.get("/health").json() == {"status": "ok"}
        (last,) = ask_all(server, [short(7)])
        assert last.json()["choices"][0]["text"] == answers[7].json()["choices"][0]["text"]
        assert last.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_more_than_the_kv_cache_holds_is_served_in_turn_with_the_same_tokens(short_dir):
    """32 sequences of up to 30 blocks where 85 are; those that exceed the context are refused."""
    long = [
        {
            "prompt": [[3 + k, 4 + k] * (20 + 3 * k)], "max_tokens": 100 + 5 * k, "seed": k,
            "temperature": 0.8 * (k % 2), "ignore_eos": True, "return_token_ids": True,
        }
        for k in range(32)
    ]  # fmt: skip
    beyond = {**long[0], "prompt": [[7] * 512]}
    with serving(short_dir, *SETTINGS, "--lanes", 3) as server:
        alone = [server.http.post("/v1/completions", json=body).json() for body in long]
        together = ask_all(server, [beyond, *long, beyond])
        refused = together[:1] + together[-1:]
        assert [answer.status_code for answer in refused] == [400, 400]
        assert all("512 tokens" in answer.json()["error"]["message"] for answer in refused)
        got = [answer.json()["choices"][0]["token_ids"] for answer in together[1:-1]]
        assert got == [answer["choices"][0]["token_ids"] for answer in alone]
        preemptions = next(
            line for line in server.http.get("/metrics").text.splitlines()
            if line.startswith("afd_preemptions ")
        )  # fmt: skip
        assert float(preemptions.split()[1]) > 0
        idle_facts(server)
        assert server.http.get("/health").json() == {"status": "ok"}
