"""A second number: does it take the first one's place in the memory?

    python benchmarks/second.py [--model smollm2-passkey] [--pairs 30] [--tokens 2000]

A session reads a text that says a number, then a text that says another, and is asked for the
second. Numbers, texts and templates are none of the training. A memory that mixes the numbers says
neither.
"""

from __future__ import annotations

from collections import Counter

import cometlm
from cometlm.eval.metrics import interval
from cometlm.eval.runner import answer_to
from cometlm.methods.comet import CometReader
from cometlm.session.session import Session
from cometlm.tasks.passkey import Passkey
from common import argument_parser

DEPTHS = (0.1, 0.25, 0.4, 0.55, 0.7)


def main() -> None:
    """Ask after each pair of texts, and count."""
    parser = argument_parser(__doc__)
    parser.add_argument("--model", default="smollm2-passkey")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=2000, help="of each of the two texts")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model, tokenizer = cometlm.load(args.model)
    tasks = [Passkey(tokenizer, seed=args.seed, depth=depth) for depth in DEPTHS]
    told: Counter[str] = Counter()
    for pair in range(args.pairs):
        # Samples of one index are of one corpus, whatever the seed.
        task = tasks[pair % len(DEPTHS)]
        other = Passkey(tokenizer, seed=args.seed + 1_000_000, depth=task.depth)
        first, second = (one.sample(pair, args.tokens) for one in (task, other))
        session = Session(model, tokenizer)
        session.read(first.context)
        session.read(second.context)
        answer = answer_to(CometReader(session), second.questions[0])
        keys = [sample.questions[0].answers[0] for sample in (first, second)]
        kind = {keys[1]: "the second", keys[0]: "the first"}.get(answer, "neither")
        told[kind] += 1
        name = second.meta["haystack"]
        print(f"{name:<12}  {keys[0]}  {keys[1]}  {answer!r}  {kind}", flush=True)
    low, high = interval(told["the second"], args.pairs)
    counts = ", ".join(f"{kind} {told[kind]}" for kind in ("the second", "the first", "neither"))
    print(f"of {args.pairs}: {counts} (the second: {low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
