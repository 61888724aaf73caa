"""A server of random weights: config.json is all it needs, and topologies agree."""

import json
from pathlib import Path

import pytest

from support.server import run_cli, serving

CONFIGS = Path(__file__).parents[2] / "configs"
CONFIG = {
    "model_type": "llama", "hidden_size": 96, "intermediate_size": 176, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 300,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "eos_token_id": 2,
}  # fmt: skip
ASK = {"messages": [{"role": "user", "content": "Hello?"}], "max_tokens": 12, "temperature": 0,
       "ignore_eos": True, "return_token_ids": True}  # fmt: skip


@pytest.fixture
def directory(tmp_path):
    directory = tmp_path / "tiny"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


@pytest.mark.slow
def test_a_config_is_served_without_weights_or_tokenizer_alike_by_all_topologies(
    directory, tmp_path
):
    answers = []
    for topology in (["--ffn-workers", "2"], ["--ffn-workers", "0"]):
        with serving(
            tmp_path, directory, "--load-format", "dummy", "--launcher", "local",
            "--kv-cache-mb", "4", "--quantization", "none", *topology,
        ) as server:  # fmt: skip
            answer = server.http.post("/v1/chat/completions", json=ASK).json()
            choice = answer["choices"][0]
            assert choice["message"]["content"]
            assert answer["usage"]["prompt_tokens"] == len("user: Hello?\nassistant:")
            answers.append(choice["token_ids"])
    assert answers[0] == answers[1]
    assert len(set(answers[0])) > 1
    assert [path.name for path in directory.iterdir()] == ["config.json"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["step-3-mini", "step-3.5-flash-mini", "deepseek-v3-mini"])
def test_the_small_shape_of_a_large_model_with_experts_is_served(name, tmp_path):
    arguments = ("--load-format", "dummy", "--launcher", "local", "--kv-cache-mb", "16")
    pools = ("--attention-workers", "2", "--ffn-workers", "2")
    with serving(tmp_path, CONFIGS / name, *arguments, *pools) as server:
        answers = [server.http.post("/v1/chat/completions", json=ASK).json() for _ in range(2)]
    assert server.topology == "2A2F"
    first, second = (answer["choices"][0]["token_ids"] for answer in answers)
    assert first == second
    assert len(set(first)) > 1


def test_dummy_weights_need_a_directory(tmp_path):
    ended = run_cli(tmp_path, "serve", "no-such", "--load-format", "dummy", "--port", "0")
    assert ended.returncode == 2
    assert "needs a directory with config.json; 'no-such' is no directory" in ended.stderr
