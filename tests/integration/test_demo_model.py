"""The demo model itself, through Ray: the promises a new user meets first."""

import concurrent.futures
import json

import openai
import pytest
import torch

from support.server import serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def demo_directory():
    """The demo model, pulled and converted once into the user's cache."""
    from afd_server.config import load_config
    from afd_server.weights.pull import pull

    return pull("smollm2-135m-instruct", load_config({}, {}).cache_directory)


@pytest.fixture(scope="module")
def transformers_model(demo_directory):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(demo_directory, dtype=torch.float32).eval()


def greedy(model, ids, count, eos=2):
    """Return transformers' greedy continuation, with its own KV cache."""
    out = model.generate(
        torch.tensor([ids]),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    return out[0, len(ids) :].tolist()


def test_the_monolith_equals_transformers_on_a_fixed_prompt(demo_directory, transformers_model):
    from afd_server.core.model_spec import read_model_spec
    from afd_server.kernels.reference import REFERENCE, PagedRun, plan_paged_rows
    from afd_server.models.base import FFNShare, MicroBatch
    from afd_server.models.head import Held
    from afd_server.models.llama import LLAMA
    from afd_server.models.monolith import run_monolith
    from afd_server.weights.checkpoint import Checkpoint
    from afd_server.weights.packed import PackedWeights
    from afd_server.workers.attention.kv_store import KVStore

    spec = read_model_spec(demo_directory)
    reader = PackedWeights(Checkpoint(demo_directory, torch.float32), REFERENCE, None)
    attention = LLAMA.attention(spec, reader, REFERENCE, 128)
    held = [Held(LLAMA, spec, reader, REFERENCE, FFNShare(p, 2)) for p in (0, 1)]
    ids = list(range(1000, 1048))
    kv = KVStore(spec, 4, 16, torch.float32).layers
    positions = list(range(len(ids)))
    batch = MicroBatch(
        torch.tensor(ids), torch.tensor(positions), torch.tensor(positions),
        plan_paged_rows([PagedRun(0, len(ids), [0, 1, 2, 3])]),
        torch.tensor(positions), kv,
    )  # fmt: skip
    logits = run_monolith(attention, held, batch)
    expected = transformers_model(torch.tensor([ids])).logits[0]
    assert (logits - expected).abs().max() <= 1e-4
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


@pytest.mark.ray
def test_paris_through_the_openai_client_with_the_tokens_of_transformers(
    transformers_model, short_dir
):
    with (
        serving(short_dir, "--quantization", "none") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client,
    ):
        assert (server.topology, server.model) == ("1A1F", "smollm2-135m-instruct")
        answer = client.chat.completions.create(
            model=server.model, messages=QUESTION, max_tokens=32, temperature=0,
            extra_body={"return_token_ids": True},
        )  # fmt: skip
    assert "Paris" in answer.choices[0].message.content
    ids = answer.prompt_token_ids
    assert answer.choices[0].token_ids == greedy(transformers_model, ids, 32)


@pytest.mark.ray
def test_sixteen_streams_through_2a2f_get_the_tokens_each_gets_alone(short_dir):
    bodies = [
        {
            "prompt": [list(range(500 + 37 * k, 500 + 37 * k + 4 + 9 * k))],
            "max_tokens": 6 + 2 * k, "temperature": 0.8 * (k % 2), "seed": 1000 + k,
            "ignore_eos": True, "return_token_ids": True, "stream": True,
        }
        for k in range(16)
    ]  # fmt: skip
    arguments = ("--attention-workers", 2, "--ffn-workers", 2)
    with serving(short_dir, *arguments) as server:
        assert server.topology == "2A2F"
        chat = {"messages": QUESTION, "max_tokens": 32, "temperature": 0}
        answer = server.http.post("/v1/chat/completions", json=chat).json()
        assert "Paris" in answer["choices"][0]["message"]["content"]
        alone = [stream_tokens(server, body) for body in bodies]
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            together = list(pool.map(lambda body: stream_tokens(server, body), bodies))
        rows = {w["name"]: w["load"]["rows"] for w in server.status()["workers"]}
    assert together == alone
    assert [len(tokens) for tokens in together] == [body["max_tokens"] for body in bodies]
    assert all(rows.values()), f"a worker had nothing to do: {rows}"


def stream_tokens(server, body) -> list[int]:
    tokens: list[int] = []
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("data: {"):
                tokens += json.loads(line.removeprefix("data: "))["choices"][0]["token_ids"]
    return tokens
