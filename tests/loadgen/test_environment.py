"""A result says what it depends on, and no more than is known."""

from pathlib import Path

from afd_server.loadgen import environment as module
from afd_server.loadgen.environment import environment


def test_a_commit_is_named_only_of_a_checkout(monkeypatch):
    checkout = Path(module.__file__).parents[2]
    assert bool(environment()["commit"]) == (checkout / ".git").exists()
    within = checkout / "tests" / "site-packages" / "afd_server" / "loadgen" / "environment.py"
    monkeypatch.setattr(module, "__file__", str(within))
    assert environment()["commit"] == ""
