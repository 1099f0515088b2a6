"""Our server and `transformers serve` over the same backbone, turn by turn."""

from __future__ import annotations

import statistics
from itertools import islice
from pathlib import Path
from typing import Any

import cometlm
from serving_parts.servers import Server
from serving_parts.streams import Streamed
from serving_parts.turns import resent


def measure(servers: dict[str, Server], turns: int, picture: Path) -> dict[str, Any]:
    """One chat with each, turn by turn; both clients send the whole conversation."""
    chats = zip(*(resent(server, 2) for server in servers.values()), strict=True)
    seen = dict(zip(servers, map(list, zip(*islice(chats, turns), strict=True)), strict=True))
    _draw(seen, picture)
    return {name: _told(one) for name, one in seen.items()} | {"picture": str(picture)}


def save_backbone(model: str, folder: Path) -> None:
    """A model's backbone without its memory, as `transformers serve` loads it."""
    attached, tokenizer = cometlm.load(model)
    cometlm.detach(attached).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _told(seen: list[Streamed]) -> dict[str, Any]:
    first = [one.first for one in seen]
    return {
        "tokens of the last prompt": seen[-1].prompt_tokens,
        "median seconds to the first token, first ten": statistics.median(first[1:11]),
        "median seconds to the first token, last ten": statistics.median(first[-10:]),
        "seconds to the first token": first,
    }


def _draw(seen: dict[str, list[Streamed]], picture: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for name, answers in seen.items():
        turns = range(1, len(answers) + 1)
        axes.plot(turns, [one.first for one in answers], label=name, linewidth=1.2)
    axes.set(xlabel="turn", ylabel="seconds to the first token", ylim=(0, None))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=150)
    plt.close(figure)
