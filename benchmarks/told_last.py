"""Is what was told last answered, wherever a chunk ended before?

    python benchmarks/told_last.py [--overlaps 8 512] [--behind 0 1900 4000] [--gap 0]

A text is read, then a fact in a sentence of its own, `--gap` tokens of another text, and the fact
is asked for in other words, in a session each. Where question and answer no longer fit into the
open chunk, the session ends it early, and all but its last half chunk is in the memory; where it
has just ended by itself, all but `overlap` tokens. Facts, names, questions and texts are the
held-out ones of the task `facts`. Prints the share whose answer was said, with its 95% interval;
writes out/told_last.json.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import cometlm
from cometlm.eval.metrics import interval
from cometlm.session.session import Session
from cometlm.tasks.base import Question
from cometlm.tasks.facts import Facts
from common import argument_parser, machine, write

ANSWER = 16  # tokens


class ToldLast:
    """Facts, and the texts that stand before and behind them."""

    def __init__(self, tokenizer: Any, count: int, seed: int) -> None:
        self._tokenizer = tokenizer
        self._facts = Facts(tokenizer, seed=seed, changes=0.0, pairs=0.0)
        self.told = self._facts.sentences(0, count)

    def running(self, number: int, tokens: int) -> Sequence[int]:
        """A text of this many tokens."""
        rng = self._facts.rng(number)
        _, haystack = self._facts.haystack(number)
        return haystack.draw(rng, tokens) if tokens else ()

    def hit(self, model: Any, number: int, behind: int, gap: int) -> bool:
        """Whether one fact's answer was said."""
        sentence, question = self.told[number]
        session = Session(model, self._tokenizer)
        session.read(self.running(number, behind))
        session.read(f"\n\n{sentence}\n\n")
        session.read(self.running(number + len(self.told), gap))
        return self._is_said(question, session.ask(question.text, max_new_tokens=ANSWER))

    def _is_said(self, question: Question, said: str) -> bool:
        return bool(self._facts.score(question, said)["found"])


def main() -> None:
    """Measure and print."""
    parser = argument_parser(__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--overlaps", type=int, nargs="+", default=[8, 512])
    parser.add_argument("--behind", type=int, nargs="+", default=[0, 1900, 4000], help="tokens")
    parser.add_argument("--gap", type=int, nargs="+", default=[0], help="tokens told since")
    parser.add_argument("--facts", type=int, default=20, help="asked for in each case")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    cells = []
    for overlap in args.overlaps:
        model, tokenizer = cometlm.load(args.model, overlap=overlap)
        model.pack_weights()
        asked = ToldLast(tokenizer, args.facts, args.seed)
        for behind in args.behind:
            for gap in args.gap:
                hits = sum(asked.hit(model, number, behind, gap) for number in range(args.facts))
                low, high = interval(hits, args.facts)
                cell = {"overlap": overlap, "behind": behind, "gap": gap, "said": hits}
                cells.append(cell | {"of": args.facts, "interval": [low, high]})
                print(
                    f"overlap {overlap}, behind {behind:,} tokens, {gap} since: {hits} of "
                    f"{args.facts} ({low:.2f} to {high:.2f})",
                    file=sys.stderr,
                    flush=True,
                )
    write("told_last", {"model": args.model, "machine": machine(), "cells": cells})


if __name__ == "__main__":
    main()
