"""Starts worker processes on this machine."""

import ctypes
import os
import signal
import subprocess
import sys
from typing import Protocol

from afd_server.core.errors import WorkerFailed
from afd_server.workers.config import WorkerSpec

STOP_S = 5.0  # from the stop signal to the kill


class Launcher(Protocol):
    """Knows how to start and stop worker processes; knows nothing of what they do."""

    def launch(self, spec: WorkerSpec) -> None:
        """Start a worker.

        Raises:
            WorkerFailed: there is no place for it.
        """
        ...

    def ending(self, incarnation: str) -> str | None:
        """Return how a worker ended, in words, or None while it lives."""
        ...

    def stop(self, incarnation: str) -> None:
        """End a worker: ask first, then kill; returns when it is gone."""
        ...

    def close(self) -> None:
        """End every worker and give back all that was taken for them."""
        ...


class LocalLauncher:
    """Workers as subprocesses, each in a session of its own so that Ctrl-C reaches only us."""

    def __init__(self, log_level: str) -> None:
        self._log_level = log_level
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def launch(self, spec: WorkerSpec) -> None:
        self._processes[spec.incarnation] = start_process(
            ["worker", "--log-level", self._log_level], spec.to_json()
        )

    def ending(self, incarnation: str) -> str | None:
        return describe_ending(self._processes[incarnation])

    def stop(self, incarnation: str) -> None:
        stop_processes([self._processes.pop(incarnation)])

    def close(self) -> None:
        stop_processes(list(self._processes.values()))
        self._processes.clear()


def start_process(
    arguments: list[str], spec: str, pass_fds: tuple[int, ...] = ()
) -> "subprocess.Popen[bytes]":
    """Start this program with a subcommand, in a new session, and give it its spec on stdin."""
    process = subprocess.Popen(
        [sys.executable, "-m", "afd_server", *arguments, "--parent", str(os.getpid())],
        stdin=subprocess.PIPE,
        start_new_session=True,
        pass_fds=pass_fds,
    )
    assert process.stdin is not None
    try:
        process.stdin.write(spec.encode())
        process.stdin.close()
    except BrokenPipeError as error:
        raise WorkerFailed(f"a process ended at once with status {process.wait()}") from error
    return process


def describe_ending(process: "subprocess.Popen[bytes]") -> str | None:
    """Return how a process ended, in words, or None while it lives."""
    status = process.poll()
    if status is None:
        return None
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def stop_processes(processes: "list[subprocess.Popen[bytes]]", patience_s: float = STOP_S) -> None:
    """Ask processes to end, wait together, then kill those that did not."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def die_with_parent(parent: int) -> None:
    """Have this process terminated when its parent dies, however it dies (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG
        if os.getppid() != parent:
            raise SystemExit("the parent is gone already")
