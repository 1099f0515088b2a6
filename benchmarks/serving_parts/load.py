"""Many clients at once, for minutes: is any answer wrong or another's, and what did they wait for?

Clients chat, go on, branch, upload texts, hang up and send what is refused. All answers are greedy;
afterwards each is asked for again, alone, of the same session. In half precision rows of a batch
round otherwise than one alone, so run it in float32.
"""

from __future__ import annotations

import random
import statistics
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import openai

from common import note
from serving_parts.servers import Server
from serving_parts.streams import Streamed, chat, sentence, texts

ANSWER = 16  # tokens
ACTIONS = {"go on": 50, "begin": 18, "branch": 12, "upload": 5, "hang up": 10, "bad request": 5}
_SAMPLES = 20  # of the process's memory


@dataclass(frozen=True)
class Asked:
    """What was asked of which session, and what came."""

    parent: str | None
    text: str
    answer: str
    name: str


@dataclass
class Client:
    """One user: what it asked, and what went wrong."""

    server: Server
    draw: random.Random
    asked: list[Asked] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    seen: list[Streamed] = field(default_factory=list)
    did: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def run(self, end: float) -> None:
        """Do one thing after another until the time is over."""
        while time.monotonic() < end:
            (action,) = self.draw.choices([*ACTIONS], [*ACTIONS.values()])
            try:
                self._do(action)
                self.did[action] += 1
            except openai.RateLimitError:
                self.did["refused for now (429)"] += 1
                time.sleep(1)
            except (openai.OpenAIError, OSError) as error:
                self.wrong.append(f"{action}: {error}")

    def _do(self, action: str) -> None:
        if action == "bad request":
            self._bad()
        elif action == "upload":
            self._upload()
        elif action == "hang up":
            self._hang_up()
        else:
            self._chat(self._parent(action))

    def _parent(self, action: str) -> str | None:
        """Going on takes the last session, branching any earlier one; both may be of a file."""
        known = [one.name for one in self.asked] + self.files
        if action == "begin" or not known:
            return None
        return known[-1] if action == "go on" else self.draw.choice(known)

    def _chat(self, parent: str | None) -> None:
        text = sentence(self.draw)
        seen = ask(self.server, parent, text)
        self.seen.append(seen)
        self.asked.append(Asked(parent, text, seen.text, seen.name))

    def _upload(self) -> None:
        lines = "\n".join(sentence(self.draw) for _ in range(60))
        made = self.server.client().files.create(
            file=("lines.txt", lines.encode()), purpose="user_data"
        )
        self.files.append(made.id)

    def _hang_up(self) -> None:
        events = self.server.client().chat.completions.create(
            model=self.server.model,
            messages=[{"role": "user", "content": sentence(self.draw)}],
            max_tokens=200,
            stream=True,
        )
        for _, text in texts(events):
            if text:
                break
        events.close()

    def _bad(self) -> None:
        bad: dict[str, Any] = self.draw.choice(
            [{"temperature": "warm"}, {"n": -1}, {"session": "chatcmpl-unknown"}, {"max_tokens": 0}]
        )
        try:
            self.server.client().chat.completions.create(
                model=self.server.model,
                messages=[{"role": "user", "content": "Hello"}],
                extra_body=bad,
            )
        except (openai.BadRequestError, openai.NotFoundError, openai.UnprocessableEntityError):
            return
        self.wrong.append(f"taken, and should have been refused: {bad}")


def ask(server: Server, parent: str | None, text: str) -> Streamed:
    """One greedy answer behind a session, or in an empty one."""
    more = {} if parent is None else {"session": parent}
    return chat(server, [{"role": "user", "content": text}], ANSWER, **more)


def measure(server: Server, clients: int, minutes: float) -> dict[str, Any]:
    """The load, then every answer again, alone."""
    users = [Client(server, random.Random(n)) for n in range(clients)]
    resident, over = [server.resident_bytes()], threading.Event()
    end = time.monotonic() + 60 * minutes

    def watch() -> None:
        while not over.wait(60 * minutes / _SAMPLES):
            resident.append(server.resident_bytes())
            note(f"{sum(len(user.asked) for user in users)} answers")

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(lambda user: user.run(end), users))
    over.set()
    watcher.join()
    print(file=sys.stderr)
    resident.append(server.resident_bytes())
    return _told(users, resident) | again(server, [one for user in users for one in user.asked])


def again(server: Server, asked: list[Asked]) -> dict[str, Any]:
    """Each question asked again with nothing beside it."""
    other = []
    for number, one in enumerate(asked):
        note(f"{number} of {len(asked)} answers asked again, {len(other)} different")
        answer = ask(server, one.parent, one.text).text
        if answer != one.answer:
            other.append({"question": one.text, "under load": one.answer, "alone": answer})
    print(file=sys.stderr)
    return {"answers asked again": len(asked), "of them different": len(other), "different": other}


def _told(users: list[Client], resident: list[int]) -> dict[str, Any]:
    seen = [one for user in users for one in user.seen]
    firsts, gaps = [s.first for s in seen], [gap for s in seen for gap in s.gaps]
    half = len(resident) // 2
    return {
        "did": dict(sum((user.did for user in users), Counter[str]())),
        "went wrong": [line for user in users for line in user.wrong],
        "seconds to the first token": _spread(firsts),
        "seconds between tokens": _spread(gaps),
        "MiB resident": [size >> 20 for size in resident],
        "resident, second half by first": max(resident[half:]) / max(resident[:half]),
    }


def _spread(values: list[float]) -> dict[str, float]:
    if len(values) < 2:  # a load of seconds
        return {"count": float(len(values))}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p99": cuts[98], "count": float(len(values))}
