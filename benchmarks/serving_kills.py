"""Does a server keep what it acknowledged? Servers are killed at random while clients talk.

    python benchmarks/serving_kills.py --times 50
    python benchmarks/serving_kills.py --times 20 --replicas 3     # behind nginx
    python benchmarks/serving_kills.py --go-on 100                 # from that many ids at the end

Each client goes on from the last answer that it was told. In the end every id that was ever told
has to be there with its text, and a conversation has to go on from it (from some, with `--go-on`).
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import argument_parser, note
from serving_parts.servers import Server, free_port, ours

NGINX = Path(__file__).parents[1] / "docker" / "nginx.conf"
_PAUSE = 0.1  # seconds that a client takes to read an answer
_FAILED = (OSError, urllib.error.URLError, ValueError, KeyError)  # of a request


@dataclass
class Report:
    """What came of it.

    Attributes:
        kills: how many servers were killed.
        failures: requests that got no answer, which were asked again.
        told: text of each response by the id that a client was told.
        served: POST requests that each replica has answered.
        continued: ids that were gone on from at the end.
        lost: ids of those that are not there, or are not what was told.
    """

    kills: int = 0
    failures: int = 0
    told: dict[str, str] = field(default_factory=dict)
    served: list[int] = field(default_factory=list)
    continued: int = 0
    lost: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.kills} kills, {len(self.told)} responses acknowledged (by replica: "
            f"{self.served} answered), {self.failures} requests broken off, "
            f"{self.continued} gone on from, {len(self.lost)} lost"
        )


def replica(folder: Path, number: int, model: str, store: str, options: Sequence[str]) -> Server:
    """A server over a store that others use, too; its log and its index are in a folder."""
    given = ["--index", str(folder / f"replica-{number}.sqlite"), "--refresh-seconds", "1"]
    log = folder / f"replica-{number}.log"
    return ours(model, store, log, [*given, *options])


def answered(server: Server) -> int:
    """Responses that it has answered, in all its lives."""
    return server.said().count('"POST /v1/responses HTTP/1.1" 200')


def get(url: str, path: str) -> dict[str, Any]:
    """What is there."""
    with urllib.request.urlopen(url + path, timeout=120) as answer:
        return dict(json.load(answer))


def ask(url: str, text: str, previous: str | None) -> dict[str, Any]:
    """A response."""
    body = {"model": "model", "input": text, "previous_response_id": previous}
    body |= {"temperature": 0, "max_output_tokens": 4}
    request = urllib.request.Request(
        f"{url}/v1/responses", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return dict(json.load(answer))


def text_of(response: dict[str, Any]) -> str:
    """What a response says."""
    return str(response["output"][0]["content"][0]["text"])


@contextlib.contextmanager
def balanced(servers: Sequence[Server], folder: Path) -> Iterator[str]:
    """The URL of nginx in front of servers, as docker/nginx.conf has it.

    Raises:
        RuntimeError: nginx is missing, or does not take the file.
    """
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        raise RuntimeError("several replicas need nginx")
    port = free_port()
    (folder / "nginx.conf").write_text(nginx_conf([server.port for server in servers], port))
    command = [program, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-g", "daemon off;"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def nginx_conf(servers: Sequence[int], port: int) -> str:
    """docker/nginx.conf for servers on ports of this machine."""
    lines, told = [], False
    for line in NGINX.read_text().splitlines():
        if line.strip().startswith("server cometlm-"):
            if not told:
                lines += [f"server 127.0.0.1:{one} max_fails=1 fail_timeout=1s;" for one in servers]
            told = True
        else:
            lines.append(line)
    text = "\n".join(lines).replace("listen 8080", f"listen 127.0.0.1:{port}")
    return text.replace("/tmp/nginx", "nginx").replace("/dev/stderr", "error.log")


def talk(url: str, number: int, report: Report, stop: threading.Event) -> None:
    """A client that goes on from the last answer it was told, whatever breaks off."""
    last, turn = None, 0
    while not stop.is_set():
        try:
            response = ask(url, f"{number}, {turn}", last)
            report.told[response["id"]] = text_of(response)
        except _FAILED:
            report.failures += 1
            time.sleep(0.1)
            continue
        last, turn = response["id"], turn + 1
        time.sleep(_PAUSE)  # those who start again need the machine, too


def kill_at_random(servers: Sequence[Server], times: int, report: Report, seed: int) -> None:
    """Kill servers and start them again; each life gets to answer something."""
    rng = random.Random(seed)
    for _ in range(times):
        most = len(report.told) + rng.randrange(2, 12)
        while len(report.told) < most:
            time.sleep(0.001)
        server = rng.choice(servers)
        server.kill()
        report.kills += 1
        server.start()
        server.wait()
        note(f"{report.kills} of {times} kills, {len(report.told)} responses acknowledged")
    print(file=sys.stderr)


def is_whole(url: str, name: str, text: str) -> bool:
    """Whether an id is there and is what was told."""
    try:
        return text_of(get(url, f"/v1/responses/{name}")) == text
    except _FAILED:
        return False


def goes_on(url: str, name: str) -> bool:
    """Whether a conversation goes on from an id."""
    try:
        return bool(ask(url, "On?", name)["previous_response_id"] == name)
    except _FAILED:
        return False


def check(url: str, report: Report, go_on: int | None, seed: int) -> None:
    """Look for each id that was told, and go on from `go_on` of them at random (None: all)."""
    names = list(report.told)
    random.Random(seed).shuffle(names)
    for number, name in enumerate(names):
        if not is_whole(url, name, report.told[name]):
            report.lost.append(name)
        elif go_on is None or report.continued < go_on:
            report.continued += 1
            if not goes_on(url, name):
                report.lost.append(name)
        note(f"{number + 1} of {len(names)} ids looked for, {len(report.lost)} lost")
    print(file=sys.stderr)


def kill(
    model: str,
    *,
    times: int,
    store: str | None = None,
    replicas: int = 1,
    clients: int = 4,
    seed: int = 0,
    go_on: int | None = None,
    options: Sequence[str] = (),
) -> Report:
    """Kill servers at random under load.

    Args:
        model, options: see `cometlm serve`.
        times: how often one is killed.
        store: where sessions are kept; None: in a temporary folder.
        replicas: servers over the store; several stand behind nginx.
        clients: that talk at the same time.
        seed: of when and which.
        go_on: how many of the ids, drawn at random, are gone on from at the end; None: all.

    Raises:
        RuntimeError: a server does not start; nginx is missing.
    """
    report, stop = Report(), threading.Event()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        place = store or str(folder / "store")
        servers = [replica(folder, i, model, place, options) for i in range(replicas)]
        for server in servers:
            server.start()
            stack.callback(server.kill)
        for server in servers:
            server.wait()
        url = servers[0].url
        if replicas > 1:
            url = stack.enter_context(balanced(servers, folder))
        threads = [
            threading.Thread(target=talk, args=(url, i, report, stop), daemon=True)
            for i in range(clients)
        ]
        for thread in threads:
            thread.start()
        try:
            kill_at_random(servers, times, report, seed)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        report.served = [answered(server) for server in servers]
        for server in servers[1:]:
            server.kill()  # the first one has to find all of it
        check(servers[0].url, report, go_on, seed)
    return report


def main() -> None:
    """See above."""
    parser = argument_parser(__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--store", help="a folder or a URL; default: a temporary folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--go-on", type=int, help="from so many ids at the end; default: from all")
    given, options = parser.parse_known_args()
    if given.go_on is not None and given.go_on < 0:
        parser.error(f"--go-on must be at least 0, got {given.go_on}")
    report = kill(
        given.model,
        times=given.times,
        store=given.store,
        replicas=given.replicas,
        clients=given.clients,
        seed=given.seed,
        go_on=given.go_on,
        options=options,
    )
    print(report)
    sys.exit(bool(report.lost))


if __name__ == "__main__":
    main()
