"""Whole servers of models with experts: placement, replicas, a lost worker, real text."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.checkpoints import tiny_llama
from support.experts import tiny_routed
from support.server import run_cli, serving

LOCAL = ("--launcher", "local")
EXPERTS = ("--ffn-workers", 2, "--ffn-parallel", "expert", "--expert-replicas", 2)
BODY = {"prompt": [[9, 8, 7, 6]], "max_tokens": 12, "temperature": 0, "return_token_ids": True}
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def tokens_of(server, **changes):
    answer = server.http.post("/v1/completions", json={**BODY, **changes})
    return answer.json()["choices"][0]["token_ids"]


def greedy(model, ids, count):
    out = model.generate(
        torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=2, pad_token_id=2
    )
    return out[0, len(ids) :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("mixtral", ["--ffn-workers", 3, "--ffn-parallel", "expert"]),
        ("qwen3_moe", ["--ffn-workers", 4, "--ffn-parallel", "hybrid", "--attention-workers", 2]),
        ("qwen3_moe", ["--ffn-workers", 0]),
        ("qwen3_moe", ["--ffn-workers", 2, "--lm-head", "ffn"]),
    ],
)
def test_servers_of_any_placement_give_transformers_tokens_and_count_experts(
    kind, arguments, short_dir
):
    directory, reference = tiny_routed(kind)
    with serving(short_dir, directory, *LOCAL, "--quantization", "none", *arguments) as server:
        got = tokens_of(server)
        counts = server.wait_for(lambda: counted(server, len(BODY["prompt"][0]) + len(got) - 1))
    assert got == greedy(reference, BODY["prompt"][0], 12)[: len(got)]
    assert counts


def test_what_is_moved_to_the_other_side_leaves_the_tokens_as_they_are(short_dir):
    directory, reference = tiny_routed("qwen3_moe", dense_layers=(0, 2))
    moved = ("--dense-layers", "attention", "--lm-head", "ffn")
    with serving(short_dir, directory, *LOCAL, "--quantization", "none", *moved) as server:
        got = tokens_of(server)
    assert got == greedy(reference, BODY["prompt"][0], 12)[: len(got)]


def counted(server, num_tokens):
    """Tell whether the experts of every layer got two choices of each token."""
    text = server.http.get("/metrics").text
    found = re.findall(r'afd_expert_tokens_total\{expert="\d+",layer="(\d)"\} (\S+)', text)
    sums = [sum(float(n) for at, n in found if at == layer) for layer in "012"]
    return sums == [2 * num_tokens] * 3 and 'afd_expert_imbalance{layer="2"}' in text


def counted_in_all_layers(server):
    """Return the hottest experts once every layer has reported some; counts come as they are."""
    hot = server.http.get("/debug/experts?hottest=2").json()
    return hot if sorted(hot) == ["0", "1", "2"] else None


@pytest.mark.slow
def test_what_was_asked_most_can_be_replicated_at_the_next_start_and_changes_no_token(short_dir):
    directory, _ = tiny_routed("mixtral")
    file = short_dir / "hot.json"
    with serving(short_dir, directory, *LOCAL, *EXPERTS) as server:
        before = tokens_of(server)
        hot = server.wait_for(lambda: counted_in_all_layers(server))
        assert server.http.get("/debug/experts?hottest=no").status_code == 400
    assert all(len(experts) == 2 for experts in hot.values())
    file.write_text(json.dumps(hot))
    with serving(short_dir, directory, *LOCAL, *EXPERTS, "--hot-experts", file) as server:
        assert tokens_of(server) == before


@pytest.mark.faults
def test_a_request_outlives_an_expert_worker_whose_experts_others_have(short_dir):
    directory, _ = tiny_routed("mixtral")
    arguments = ("--ffn-workers", 3, "--ffn-parallel", "expert", "--expert-replicas", 2)
    with serving(short_dir, directory, *LOCAL, *arguments) as server:
        alone = tokens_of(server, max_tokens=200, ignore_eos=True)
        body = {**BODY, "max_tokens": 200, "ignore_eos": True, "stream": True}
        got = []
        with server.http.stream("POST", "/v1/completions", json=body) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    got += json.loads(line.removeprefix("data: "))["choices"][0]["token_ids"]
                    if len(got) == 20:
                        server.worker_processes()[2].kill()
    assert got == alone


@pytest.mark.parametrize(
    ("model", "arguments", "complaint"),
    [
        ("routed", ["--expert-replicas", 2], "expert_replicas is 2, which goes with"),
        (
            "routed",
            ["--ffn-workers", 2, "--ffn-parallel", "expert", "--expert-replicas", 3],
            "only 2 holders of experts",
        ),
        (
            "routed",
            ["--ffn-workers", 3, "--ffn-parallel", "hybrid"],
            "no multiple of expert_shards",
        ),
        ("routed", ["--ffn-workers", 81, "--ffn-parallel", "tensor"], "has only 80"),
        ("dense", ["--ffn-parallel", "expert"], "llama has no experts; use tensor or replicate"),
        ("routed", ["--hot-experts", "hot.json"], "hot_experts names experts to be replicated"),
        ("routed", [*EXPERTS, "--hot-experts", "no-such.json"], "No such file"),
        ("routed", [*EXPERTS, "--hot-experts", "list.json"], "expected a JSON object from layers"),
        ("routed", [*EXPERTS, "--hot-experts", "beyond.json"], "has no expert 8 in layer 1"),
        ("dense", ["--dense-layers", "attention"], "nothing is left for ffn_workers (1)"),
        ("dense", ["--dense-layers", "both", "--ffn-workers", 2], "and whole FFNs"),
        ("dense", ["--dense-layers", "both", "--data-transport", "tcp"], "workers on one host"),
        (
            "dense",
            ["--lm-head", "ffn", "--max-num-seqs", 65000, "--max-batch-tokens", 65001],
            "max_num_seqs 65000 makes logits of 67340000 bytes, a message holds 67108864",
        ),
    ],
)
def test_a_placement_that_does_not_fit_is_refused_with_what_would(
    model, arguments, complaint, short_dir
):
    directory = tiny_routed("qwen3_moe")[0] if model == "routed" else tiny_llama()[0]
    files = {"hot.json": '{"1": [0]}', "list.json": "[1, 2]", "beyond.json": '{"1": [0, 8]}'}
    for name, text in files.items():
        (short_dir / name).write_text(text)
    arguments = [short_dir / a if a in files else a for a in arguments]
    done = run_cli(short_dir, "serve", directory, "--port", 0, *LOCAL, *arguments)
    assert done.returncode == 2
    assert complaint in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_experts_that_are_all_the_demo_models_ffn_write_what_the_demo_model_writes(short_dir):
    from transformers import AutoModelForCausalLM

    from afd_server.config import load_config
    from afd_server.weights.pull import pull

    dense = pull("smollm2-135m-instruct", load_config({}, {}).cache_directory)
    upcycled = short_dir / "upcycled"
    upcycled.mkdir()
    write_upcycled(dense, upcycled, num_experts=3)
    arguments = ("--ffn-workers", 3, "--ffn-parallel", "expert", "--quantization", "none")
    with serving(short_dir, upcycled, *LOCAL, *arguments, "--max-model-len", 512) as server:
        chat = {"messages": QUESTION, "max_tokens": 32, "temperature": 0, "return_token_ids": True}
        answer = server.http.post("/v1/chat/completions", json=chat).json()
        rows = {w["name"]: w["load"]["rows"] for w in server.status()["workers"]}
    choice, ids = answer["choices"][0], answer["prompt_token_ids"]
    assert "Paris" in choice["message"]["content"]
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    assert choice["token_ids"] == greedy(model, ids, 32)
    assert all(rows.values()), f"a worker had nothing to do: {rows}"


def write_upcycled(dense, directory, num_experts):
    """Write a Mixtral whose experts are all the FFN of a Llama; its gates are random.

    A token's weights sum to one, so the outputs are the Llama's whatever the gates say.
    """
    config = json.loads((dense / "config.json").read_text())
    config |= {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "sliding_window": None,
        "num_local_experts": num_experts, "num_experts_per_tok": 2,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    tensors, written = load_file(dense / "model.safetensors"), {}
    renamed = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    for name, tensor in tensors.items():
        if ".mlp." not in name:
            written[name] = tensor
            continue
        prefix, projection = name.removesuffix(".weight").split(".mlp.")
        for expert in range(num_experts):
            place = f"{prefix}.block_sparse_moe.experts.{expert}.{renamed[projection]}.weight"
            written[place] = tensor.clone()
        gate = f"{prefix}.block_sparse_moe.gate.weight"
        generator = torch.Generator().manual_seed(len(written))
        shape = (num_experts, config["hidden_size"])
        written.setdefault(gate, torch.randn(shape, generator=generator).to(tensor.dtype))
    save_file(written, directory / "model.safetensors")
    for path in dense.iterdir():
        if path.is_file() and path.suffix in (".json", ".jinja") and path.name not in (
            "config.json", "manifest.json",
        ):  # fmt: skip
            (directory / path.name).write_bytes(path.read_bytes())
