"""A real `afd-server serve` as a subprocess, and what it may leave behind: nothing."""

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil

READY = re.compile(r"^ready: (\S+)  topology (\S+)  model (.+)$", re.MULTILINE)


class Server:
    """A running server: its process, what it printed, how to ask it."""

    def __init__(self, process: subprocess.Popen, output: str, temp_dir: Path) -> None:
        ready = READY.search(output)
        assert ready, output
        self.process = process
        self.output = output
        self.temp_dir = temp_dir
        self.url, self.topology, self.model = ready.groups()
        self.http = httpx.Client(base_url=self.url, timeout=120)

    def status(self) -> dict:
        return self.http.get("/status").json()

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def worker_processes(self) -> list[psutil.Process]:
        """Return the worker processes of the local launcher, attention first, by slot."""
        found = [p for p in self.descendants() if "worker" in p.cmdline()]
        return sorted(found, key=lambda p: p.create_time())

    def wait_for(self, condition, seconds: float = 20.0):
        """Poll until a condition holds, and return what it gave."""
        give_up = time.monotonic() + seconds
        while time.monotonic() < give_up:
            with contextlib.suppress(httpx.HTTPError):
                if result := condition():
                    return result
            select.select([], [], [], 0.05)
        raise AssertionError(f"did not happen within {seconds} s; status {self.status()}")

    def all_blocks_free(self) -> bool:
        loads = [w["load"] for w in self.status()["workers"] if w["name"].startswith("attention")]
        return all(
            load
            and load["free_blocks"] == load["num_blocks"]
            and not load["running"] + load["waiting"]
            for load in loads
        )


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "afd_server", *map(str, arguments)]


def environment(temp_dir: Path, **extra: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AFD_", "RAY_"))}
    return {**kept, "TMPDIR": str(temp_dir), **extra}


@contextlib.contextmanager
def serving(
    temp_dir: Path, *arguments: object, seconds: float = 100.0, env: dict[str, str] | None = None
) -> Iterator[Server]:
    """Serve with these arguments on a free port; stop with SIGTERM and check what is left.

    Unless the arguments say otherwise, no request is refused for being late.
    """
    modes = [] if "--slo-mode" in arguments else ["--slo-mode", "off"]
    process = subprocess.Popen(
        command("serve", "--port", "0", *modes, *arguments),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment(temp_dir, **(env or {})),
    )  # fmt: skip
    try:
        output = read_until_ready(process, seconds)
        server = Server(process, output, temp_dir)
        with server.http:
            yield server
        children = server.descendants()
        process.send_signal(signal.SIGTERM)
        rest = process.communicate(timeout=60)[0].decode()
        assert process.returncode == 0, rest
        assert "Traceback" not in rest, rest
        assert_nothing_left(children, temp_dir)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def read_until_ready(process: subprocess.Popen, seconds: float) -> str:
    output, give_up = b"", time.monotonic() + seconds
    while not (READY.search(output.decode()) and b"try:" in output and output.endswith(b"\n")):
        left = give_up - time.monotonic()
        readable, _, _ = select.select([process.stdout], [], [], max(left, 0))
        assert readable, f"not ready after {seconds} s: {output.decode()}"
        part = os.read(process.stdout.fileno(), 65536)
        assert part, f"ended with {process.wait()}: {output.decode()}"
        output += part
    return output.decode()


def assert_nothing_left(children: list[psutil.Process], temp_dir: Path) -> None:
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive, [p.cmdline() for p in alive]
    left = [path for path in temp_dir.iterdir() if path.name.startswith(("afd-", "ray"))]
    assert not left


def run_cli(temp_dir: Path, *arguments: object, seconds: float = 60, **env: str):
    """Run a command to its end and return it, completed."""
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=seconds,
        env=environment(temp_dir, **env), check=False,
    )  # fmt: skip
