"""Servers as users start them, each a process with a port of its own."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import openai

PATIENCE = 300.0  # seconds that a server may take to load its model


@dataclass(frozen=True)
class Server:
    """A server that answers.

    Attributes:
        url: without a path.
        model: what it calls its model.
        process: to be killed, or looked at.
    """

    url: str
    model: str
    process: subprocess.Popen[bytes]

    def client(self) -> openai.OpenAI:
        """One that gives up at the first error, since each is to be seen."""
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE
        )

    def get(self, path: str) -> str:
        """What is there, as text."""
        with urllib.request.urlopen(self.url + path, timeout=PATIENCE) as answer:
            return str(answer.read().decode())

    def resident_bytes(self) -> int:
        """What the process holds in memory; Linux only."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        (line,) = (line for line in status.splitlines() if line.startswith("VmRSS:"))
        return 1024 * int(line.split()[1])


@contextlib.contextmanager
def ours(model: str, store: Path, log: Path, options: Sequence[str] = ()) -> Iterator[Server]:
    """`cometlm serve` of a model."""
    port = free_port()
    command = [sys.executable, "-m", "cometlm", "serve", model, "--name", "model"]
    command += ["--port", str(port), "--store", str(store), *options]
    with _running(command, port, "model", log) as server:
        yield server


@contextlib.contextmanager
def theirs(folder: Path, log: Path) -> Iterator[Server]:
    """`transformers serve` of a model's folder."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder)]
    command += ["--port", str(port), "--host", "127.0.0.1", "--log-level", "warning"]
    with _running(command, port, str(folder), log) as server:
        yield server


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
    return port


@contextlib.contextmanager
def _running(command: list[str], port: int, model: str, log: Path) -> Iterator[Server]:
    with log.open("ab") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
    server = Server(f"http://127.0.0.1:{port}", model, process)
    try:
        _wait(server, log)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(server: Server, log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if server.process.poll() is not None:
            break
        try:
            server.get("/health")
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
        else:
            return
    last = log.read_text(encoding="utf-8", errors="replace")[-2000:]
    raise RuntimeError(f"the server does not answer; its last words are\n{last}")
