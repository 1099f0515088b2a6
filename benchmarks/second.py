"""A second number: does it take the first one's place in the memory?

    python benchmarks/second.py [--model smollm2] [--pairs 30] [--tokens 2000]

A session reads a text that says a number, then a text that says another, and is asked for the
second. Numbers, hay and wordings are none of the training. A memory that mixes them says neither.
"""

from __future__ import annotations

import random
from collections import Counter

import cometlm
from cometlm.data.corpora import text_files
from cometlm.data.hay import FileHay
from cometlm.data.passkey import PasskeyTask
from cometlm.data.wordings import MEASURING
from cometlm.eval.passkey import HAY, interval, said
from cometlm.session.session import Session
from common import argument_parser


def main() -> None:
    """Ask after each pair of texts, and count."""
    parser = argument_parser(__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=2000, help="of each of the two texts")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model, tokenizer = cometlm.load(args.model)
    tasks = [
        PasskeyTask(tokenizer, FileHay(tokenizer, text_files(name)), MEASURING, digits=(5, 5))
        for name in HAY
    ]
    told: Counter[str] = Counter()
    for pair in range(args.pairs):
        chance = random.Random(f"{args.seed}/{pair}")
        which = pair % len(HAY)
        first, second = (
            tasks[which].draw(chance, args.tokens, depth=0.1 + 0.6 * chance.random())
            for _ in range(2)
        )
        session = Session(model, tokenizer)
        session.read(first.text)
        session.read(second.text)
        answer = said(session, second)
        kind = {second.key: "the second", first.key: "the first"}.get(answer, "neither")
        told[kind] += 1
        print(f"{HAY[which]:<12}  {first.key}  {second.key}  {answer!r}  {kind}", flush=True)
    low, high = interval(told["the second"], args.pairs)
    counts = ", ".join(f"{kind} {told[kind]}" for kind in ("the second", "the first", "neither"))
    print(f"of {args.pairs}: {counts} (the second: {low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
