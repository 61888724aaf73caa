"""Plots are drawn of what the files have, and missing parts are said."""

import json
import sys
import warnings
from itertools import count

import pytest

from afd_server.core.errors import ConfigError
from afd_server.core.request import SLO
from afd_server.loadgen.plots import draw_report
from afd_server.workload.report import Outcome, RequestRecord, details, summarise

TARGET = SLO(tpot_s=0.05)
PNG = b"\x89PNG"


def record(number, tpot=0.04, outcome=Outcome.COMPLETED):
    at = 0.2 * number
    chunks = tuple(at + 0.1 + tpot * n for n in range(4))
    return RequestRecord(at, at, chunks[-1], chunks, 8, 4, outcome)


def in_pieces(num_chunks, num_tokens):
    """Return a record of an answer that came at once: without gaps, or without a TPOT."""
    return RequestRecord(0.0, 0.0, 0.1, (0.1,) * num_chunks, 8, num_tokens)


def result(rate, label="", detailed=False, topology=None, records=None):
    records = records or [record(n) for n in range(20)]
    records = [*records, record(20, outcome=Outcome.REFUSED)]
    return {
        "label": label,
        "request_rate": rate,
        "max_concurrency": None,
        "server": {"topology": topology},
        **summarise(records, TARGET),
        **(details(records, TARGET) if detailed else {}),
    }


@pytest.fixture
def draw(tmp_path):
    def drawing(*results, names=None):
        paths = []
        for name, each in zip(names or count(), results, strict=False):
            paths.append(tmp_path / f"{name}.json")
            paths[-1].parent.mkdir(exist_ok=True)
            paths[-1].write_text(json.dumps(each))
        with warnings.catch_warnings(action="error"):
            drawn = draw_report(paths, tmp_path / "plots")
        assert all(path.read_bytes().startswith(PNG) for path in drawn)
        return sorted(path.name for path in drawn)

    return drawing


def test_every_report_has_throughput_and_rates(draw):
    assert draw(result(1.0), result("inf", topology="2A1F")) == ["pareto.png", "rate.png"]


def test_labels_at_the_same_rate_are_compared(draw):
    drawn = draw(result(1.0, "controller on"), result(1.0, "controller off"), result(2.0, "on"))
    assert "compare.png" not in drawn  # no rate that all have
    drawn = draw(result(1.0, "controller on"), result(1.0, "controller off"))
    assert drawn == ["compare.png", "pareto.png", "rate.png"]


def test_details_give_distributions_and_a_timeline(draw):
    drawn = draw(result(1.0), result(2.0, detailed=True))
    assert drawn == ["cdf.png", "pareto.png", "rate.png", "timeline-1.png"]


def test_files_of_the_same_name_have_a_timeline_each(draw):
    both = [result(1.0, label, detailed=True) for label in ("on", "off")]
    drawn = draw(*both, names=["on/run", "off/run"])
    assert [name for name in drawn if "timeline" in name] == [
        "timeline-run-2.png", "timeline-run.png"
    ]  # fmt: skip


def test_loads_without_a_rate_are_not_drawn_against_it(draw):
    assert draw(result("inf"), result("inf", "other")) == ["pareto.png"]


def test_answers_of_one_token_or_in_one_piece_are_drawn_as_far_as_they_have_figures(draw):
    short = result(1.0, detailed=True, records=[in_pieces(1, 1)])
    whole = result(1.0, detailed=True, records=[in_pieces(1, 4)])
    assert whole["p50_tpot_ms"] == 0
    assert draw(short) == ["rate.png", "timeline-0.png"]
    assert draw(whole) == ["cdf.png", "rate.png", "timeline-0.png"]
    assert draw(short, whole, result(2.0, detailed=True))[:2] == ["cdf.png", "pareto.png"]


def test_a_result_of_which_nothing_can_be_drawn_is_named(draw):
    with pytest.raises(ConfigError, match="there is no TPOT and no rate in .*0.json"):
        draw(result("inf", records=[in_pieces(1, 1)]))


def test_the_points_of_a_search_are_runs(draw):
    points = [result(1.0, detailed=True), result(2.0), result(1.5)]
    drawn = draw({"goodput_rate": 1.0, "points": points})
    assert drawn == ["cdf.png", "pareto.png", "rate.png", "timeline-0-0.png"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "cannot be read"),
        ("[]", "is no result of afd-server bench"),
        ("{}", "is no result"),
        ('{"points": 3}', "is no result"),
        ('{"points": null}', "is no result"),
        ('{"points": [3]}', "is no result"),
    ],
)
def test_another_file_is_named(tmp_path, text, says):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"other.json {says}"):
        draw_report([path], tmp_path)


@pytest.mark.parametrize("key", ["completed", "max_concurrency", "request_goodput", "slo"])
def test_a_result_without_what_plots_need_is_none(tmp_path, key):
    other = result(1.0)
    del other[key]
    (tmp_path / "r.json").write_text(json.dumps(other))
    with pytest.raises(ConfigError, match="r.json is no result of afd-server bench"):
        draw_report([tmp_path / "r.json"], tmp_path)


def test_files_without_a_completed_request_are_said_to_be_empty(tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(result(1.0) | {"completed": 0}))
    with pytest.raises(ConfigError, match="no completed request in .*r.json"):
        draw_report([path], tmp_path)


def test_without_matplotlib_one_is_told_what_to_install(draw, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"plots need matplotlib: pip install"):
        draw(result(1.0))


def test_a_directory_that_cannot_be_made_is_named(draw, tmp_path):
    (tmp_path / "plots").write_text("a file")
    with pytest.raises(ConfigError, match="plots cannot be written"):
        draw(result(1.0))
