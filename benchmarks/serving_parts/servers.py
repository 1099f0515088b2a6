"""Servers as users start them, each a process with a port of its own."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import openai

PATIENCE = 300.0  # seconds that a server may take to load its model, or to answer
_MODEL = "model"  # what ours calls its model


class Server:
    """A server process, at the same place over all its lives.

    Args:
        command: starts it; it is told `port`.
        port: that it listens on.
        model: what it calls its model.
        log: what it says goes there, behind what is there already.

    Attributes:
        url: without a path.
        port, model: see above.
    """

    def __init__(self, command: Sequence[str], port: int, model: str, log: Path) -> None:
        self.url, self.port, self.model = f"http://127.0.0.1:{port}", port, model
        self._command, self._log = list(command), log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; it does not answer at once."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)

    def wait(self) -> None:
        """Wait until it answers.

        Raises:
            RuntimeError: it does not.
        """
        end = time.monotonic() + PATIENCE
        while self._running.poll() is None and time.monotonic() < end:
            try:
                self.get("/health")
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.1)
            else:
                return
        raise RuntimeError(f"the server does not answer; its last words are\n{self.said()[-2000:]}")

    def stop(self) -> None:
        """Ask it to end, and wait until it has."""
        self._running.terminate()
        try:
            self._running.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """Kill it, in the middle of whatever it does."""
        self._running.kill()
        self._running.wait()

    def client(self, sending: Callable[[Any], object] = lambda request: None) -> openai.OpenAI:
        """One that gives up at the first error, since each is to be seen.

        Args:
            sending: is told when a request is made and about to leave.
        """
        return openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key="none",
            max_retries=0,
            timeout=PATIENCE,
            http_client=openai.DefaultHttpxClient(event_hooks={"request": [sending]}),
        )

    def get(self, path: str) -> str:
        """What is there, as text."""
        with urllib.request.urlopen(self.url + path, timeout=PATIENCE) as answer:
            return str(answer.read().decode())

    def said(self) -> str:
        """Its log, of all its lives."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def resident_bytes(self) -> int:
        """What the process holds in memory; Linux only."""
        status = Path(f"/proc/{self._running.pid}/status").read_text(encoding="ascii")
        (line,) = (line for line in status.splitlines() if line.startswith("VmRSS:"))
        return 1024 * int(line.split()[1])

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "it was not started"
        return self._process


def ours(model: str, store: Path | str, log: Path, options: Sequence[str] = ()) -> Server:
    """`cometlm serve` of a model, which is called "model".

    Args:
        model, store, options: as the command takes them.
        log: see `Server`.
    """
    port = free_port()
    command = [sys.executable, "-m", "cometlm", "serve", model, "--name", _MODEL]
    command += ["--port", str(port), "--store", str(store), *options]
    return Server(command, port, _MODEL, log)


def theirs(folder: Path, log: Path) -> Server:
    """`transformers serve` of a model's folder."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder)]
    command += ["--port", str(port), "--host", "127.0.0.1", "--log-level", "warning"]
    return Server(command, port, str(folder), log)


@contextlib.contextmanager
def running(server: Server) -> Iterator[Server]:
    """Start a server, and stop it at the end."""
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.stop()


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
    return port
