"""`afd-server bench` as a user meets it: lines, files, exit statuses, errors."""

import dataclasses
import json
import resource
import signal
import subprocess
from functools import partial

import pytest

from afd_server.core.errors import ConfigError, TransportError
from afd_server.loadgen import bench as bench_module
from afd_server.loadgen.bench import FAILED, INTERRUPTED, run_bench
from afd_server.loadgen.config import bench_config
from afd_server.loadgen.results import unique_names
from afd_server.workload.search import RateSearch
from support.fake_openai import faking
from support.server import command, environment

VLLM_KEYS = {
    "date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts",
    "request_rate", "burstiness", "max_concurrency", "duration", "completed", "failed",
    "total_input_tokens", "total_output_tokens", "request_throughput", "request_goodput",
    "output_throughput", "total_token_throughput", "max_output_tokens_per_s",
    "max_concurrent_requests",
    *(f"{figure}_{name}_ms" for figure in ("mean", "median", "std", "p99")
      for name in ("ttft", "tpot", "itl", "e2el")),
    "input_lens", "output_lens", "ttfts", "itls", "start_times", "errors",
}  # fmt: skip
SMALL = {"input_len": "8", "output_len": "4", "duration_s": 0.2}


def bench(fake, **flags):
    return replay(fake, **{**SMALL, **flags})


def replay(fake, **flags):
    lines = []
    return run_bench(bench_config({"url": fake.url, **flags}), lines.append), lines


def num_rows(lines):
    """Count the table's lines; on a busy machine the client may say beneath that it was late."""
    return sum(not line.startswith("  the client") for line in lines)


def load(path):
    return json.loads(path.read_text())


def test_a_run_gives_a_line_and_a_file_with_the_keys_of_vllm_and_our_blocks(tmp_path):
    path = tmp_path / "r.json"
    with faking(gap_s=0.002) as fake:
        status, lines = bench(
            fake, request_rate="50", slo_mix="20:1,50:1", output=path, save_detailed=True
        )
    result = load(path)
    assert (status, num_rows(lines)) == (0, 2)
    assert result.keys() >= VLLM_KEYS
    assert (result["num_prompts"], result["completed"], result["request_rate"]) == (10, 10, 50.0)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (80, 40)
    assert result["model_id"] == "fake"
    assert {part["tpot_ms"] for part in result["slo"]["classes"]} == {20.0, 50.0}
    assert result["slo"]["attainment"] is not None
    assert result["environment"]["cores"] >= 1
    assert result["client"]["cpu_share"] > 0
    assert result["server"] == {"url": fake.url, "topology": None, "version": None}
    assert not result["interrupted"]


def test_the_same_seed_sends_the_same_prompts_again_under_another_salt():
    with faking() as fake:
        for seed in (1, 1, 2):
            bench(fake, request_rate="100", seed=seed, num_prompts=5, num_warmups=0)
    runs = [fake.bodies[n : n + 5] for n in (0, 5, 10)]
    prompts = [sorted(body["prompt"] for body in run) for run in runs]
    assert prompts[0] == prompts[1] != prompts[2]
    assert len({run[0]["cache_salt"] for run in runs}) == 3


def test_a_sweep_is_a_line_and_a_file_for_each_rate_and_width(tmp_path):
    with faking() as fake:
        status, lines = bench(
            fake, request_rate="100,inf", max_concurrency="1,2", num_prompts=4,
            output=tmp_path / "r.json",
        )  # fmt: skip
    assert (status, num_rows(lines)) == (0, 5)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["r-c1.json", "r-c2.json", "r-r100-c1.json", "r-r100-c2.json"]
    assert load(tmp_path / "r-c2.json")["request_rate"] == "inf"


def test_points_of_the_same_rate_are_files_of_their_own(tmp_path):
    with faking() as fake:
        bench(fake, request_rate="100,100,1e2", num_prompts=2, output=tmp_path / "r.json")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["r-r100-2.json", "r-r100-3.json", "r-r100.json"]


def test_a_number_makes_no_name_equal_to_another():
    assert unique_names(["a", "a", "a-2", "b"]) == ["a", "a-2", "a-2-2", "b"]


def test_as_many_connections_are_allowed_as_may_be():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, before[1]), before[1]))
    try:
        with faking() as fake:
            bench(fake, request_rate="100", num_prompts=1)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_failed_requests_give_exit_status_one_with_the_reason(tmp_path):
    with faking(conduct=lambda number: "break" if number == 3 else "serve") as fake:
        status, lines = bench(fake, request_rate="50", output=tmp_path / "r.json")
    assert status == FAILED
    assert "  failed: the connection ended before the answer" in lines
    assert load(tmp_path / "r.json")["failures"] == ["the connection ended before the answer"]


def test_a_server_that_goes_away_ends_the_run_with_exit_status_one():
    with faking(conduct=lambda number: "die" if number == 4 else "serve") as fake:
        status, lines = bench(fake, request_rate="20")
    assert status == FAILED
    assert any(line.startswith("  failed: no connection") for line in lines)


def test_refusals_are_no_failures():
    with faking(conduct=lambda number: "refuse" if number == 3 else "serve") as fake:
        status, _ = bench(fake, request_rate="50")
    assert status == 0


def test_find_goodput_reports_a_rate_that_holds_and_all_points(tmp_path):
    path = tmp_path / "r.json"
    with faking(first_s=0.1) as fake:
        fake.max_live = 3
        status, lines = bench(
            fake, request_rate="16", burstiness=float("inf"), find_goodput=True, output=path,
            duration_s=0.5,
        )  # fmt: skip
    result = load(path)
    held = [point["request_rate"] for point in result["points"] if point["holds"]]
    missed = [point["missed"] for point in result["points"] if not point["holds"]]
    assert status == 0
    assert result["goodput_rate"] == result["request_rate"] == max(held)
    assert any("refused" in reason for reasons in missed for reason in reasons)
    assert max(held) < result["lowest_missed_rate"] <= 1.05 * max(held)
    assert lines[-1].startswith(f"goodput: {result['goodput_rate']:.4g} requests/s")


def test_find_goodput_without_a_rate_that_holds_says_so(tmp_path):
    with faking(gap_s=0.01) as fake:
        status, lines = bench(
            fake, request_rate="1e5", duration_s=1e-5, tpot_slo_ms=0.001, find_goodput=True,
            output=tmp_path / "r.json",
        )  # fmt: skip
    assert status == FAILED
    assert lines[-1] == "no rate tried keeps p99 TPOT within 0.001 ms"
    result = load(tmp_path / "r.json")
    assert result["goodput_rate"] is None
    assert result["lowest_missed_rate"] == min(p["request_rate"] for p in result["points"])


def test_a_search_that_never_missed_has_found_a_lower_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_module, "missed_targets", lambda _result: [])
    monkeypatch.setattr(bench_module, "RateSearch", partial(RateSearch, most_points=2))
    with faking() as fake:
        status, lines = bench(
            fake, request_rate="50", find_goodput=True, output=tmp_path / "r.json"
        )
    result = load(tmp_path / "r.json")
    assert (status, result["goodput_rate"], result["lowest_missed_rate"]) == (0, 100.0, None)
    assert lines[-1] == "goodput: at least 100 requests/s with p99 TPOT within 50 ms"


@pytest.mark.parametrize(
    ("num_held", "says"),
    [
        (0, "no rate tried so far keeps p99 TPOT within 50 ms"),
        (1, "goodput so far: 50 requests/s with p99 TPOT within 50 ms"),
    ],
)
def test_an_interrupted_search_says_what_it_has_and_judges_no_unfinished_run(
    tmp_path, monkeypatch, num_held, says
):
    real, runs = bench_module.run_load, []

    async def run_load(*arguments, **options):
        run = await real(*arguments, **options)
        runs.append(run)
        return dataclasses.replace(run, interrupted=len(runs) == 2 + num_held)

    monkeypatch.setattr(bench_module, "missed_targets", lambda _result: [])
    monkeypatch.setattr(bench_module, "run_load", run_load)
    with faking() as fake:
        status, lines = bench(
            fake, request_rate="50", find_goodput=True, output=tmp_path / "r.json"
        )
    result = load(tmp_path / "r.json")
    assert (status, result["interrupted"], lines[-1]) == (INTERRUPTED, True, says)
    assert result["lowest_missed_rate"] is None
    assert [point["missed"] for point in result["points"]] == [[]] * num_held + [["interrupted"]]


def test_a_trace_is_replayed_at_the_asked_rate_with_its_shared_blocks(tmp_path):
    trace = tmp_path / "trace.jsonl"
    entry = '{{"timestamp": {}, "input_length": 10, "output_length": 3, "hash_ids": [1, {}]}}\n'
    trace.write_text("".join(entry.format(1000 * n, n + 2) for n in range(4)))
    path = tmp_path / "r.json"
    with faking() as fake:
        flags = {"trace": trace, "trace_block_size": 8, "num_warmups": 0, "output": path}
        status, _ = replay(fake, request_rate="30", save_detailed=True, **flags)
    result = load(path)
    assert status == 0
    assert result["intended_times"] == pytest.approx([0.0, 1 / 30, 2 / 30, 0.1])
    assert {tuple(body["prompt"][:8]) for body in fake.bodies} == {
        tuple(fake.bodies[0]["prompt"][:8])
    }
    assert len({tuple(body["prompt"][8:]) for body in fake.bodies}) == 4


def test_lengths_beyond_the_models_are_refused_before_anything_is_sent(tmp_path):
    trace = tmp_path / "t.jsonl"
    line = '{{"timestamp": {}, "input_length": 5000, "output_length": 1}}\n'
    trace.write_text(line.format(0) + line.format(9))
    with faking() as fake:
        with pytest.raises(ConfigError, match=r"make 4100 tokens, but max_model_len of fake is 40"):
            bench(fake, input_len="8:4096")
        with pytest.raises(ConfigError, match=r"2 of 2 requests of .* the longest has 5001"):
            replay(fake, trace=trace)
        assert not fake.bodies
        fake.max_model_len = None
        assert bench(fake, request_rate="100", input_len="8:4096", num_prompts=1)[0] == 0


def test_what_cannot_be_served_at_all_is_said_before_the_run():
    with faking(conduct=lambda _: "reject") as fake:
        with pytest.raises(TransportError, match="a first request was not served: HTTP 400: no"):
            bench(fake)
        fake.lists_models = False
        with pytest.raises(TransportError, match="the server lists no model, give --model"):
            bench(fake)


def test_a_model_may_be_one_that_the_server_does_not_list(tmp_path):
    with faking() as fake:
        fake.lists_models = False
        bench(fake, model="alias", request_rate="100", output=tmp_path / "r.json")
    assert load(tmp_path / "r.json")["model_id"] == "alias"
    assert {body["model"] for body in fake.bodies} == {"alias"}


def test_a_trace_that_does_not_fit_what_is_asked_is_refused(tmp_path):
    trace = tmp_path / "t.jsonl"
    line = '{"timestamp": 0, "input_length": 5, "output_length": 1}\n'
    trace.write_text(2 * line)
    with faking() as fake:
        with pytest.raises(ConfigError, match="num_prompts is 3, but .* has 2"):
            replay(fake, trace=trace, num_prompts=3)
        with pytest.raises(ConfigError, match="have the same timestamp"):
            replay(fake, trace=trace)
        with pytest.raises(ConfigError, match="cannot be read"):
            replay(fake, trace=tmp_path / "none")


def test_a_file_that_cannot_be_written_is_named_if_possible_before_the_run(tmp_path):
    with faking() as fake:
        with pytest.raises(ConfigError, match=r"none/r.json cannot be written: there is no such"):
            bench(fake, output=tmp_path / "none" / "r.json")
        with pytest.raises(ConfigError, match="cannot be written: it is a directory"):
            bench(fake, output=tmp_path)
        assert not fake.bodies
        (tmp_path / "r-r99.json").mkdir()
        with pytest.raises(ConfigError, match=r"r-r99.json cannot be written: Is a directory"):
            bench(fake, request_rate="99,100", output=tmp_path / "r.json")


def test_a_client_that_cannot_keep_up_says_so():
    with faking() as fake:
        _, lines = bench(fake, request_rate="50000", num_prompts=300, output_len="1")
    assert any("the client is the bottleneck" in line for line in lines)


def hear_ctrl_c():
    """Undo what a shell does to jobs in its background, where the tests may run."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_leaves_a_partial_result_marked_as_such(tmp_path):
    path = tmp_path / "r.json"
    with faking() as fake:
        process = subprocess.Popen(
            command("bench", "--url", fake.url, "--request-rate", 20, "--output", path),
            preexec_fn=hear_ctrl_c, stdout=subprocess.PIPE, env=environment(tmp_path),
        )  # fmt: skip
        while len(fake.bodies) < 5:
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=30)[0].decode()
    result = load(path)
    assert (process.returncode, result["interrupted"]) == (INTERRUPTED, True)
    assert 1 <= result["completed"] < 100
    assert "interrupted: what had been answered is counted, the result is partial" in output
