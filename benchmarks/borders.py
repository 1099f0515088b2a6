"""Keys that a chunk's border cuts: are they found, with and without an overlap of chunks?

    python benchmarks/borders.py [--model smollm2-passkey] [--keys 24] [--overlaps 0 8]

Keys, texts and templates are none of the training. A text has three chunks, and the key stands
before its last third. "inside" are keys in one chunk, "cut" those whose digits a border of fixed
chunks parts, "sentence cut" those where it parts the digits from the words before.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import cometlm
from cometlm.eval.runner import answer_to
from cometlm.methods.comet import CometReader
from cometlm.session.session import Session
from cometlm.tasks import Sample
from cometlm.tasks.passkey import Passkey
from common import argument_parser

KINDS = ("inside", "sentence cut", "cut")
CHUNKS = 3


def kind_of(sample: Sample, tokenizer: Any, size: int) -> str:
    """How the border of fixed chunks stands to a sample's key."""
    (needle,) = sample.questions[0].evidence
    digits = [i for i in needle if tokenizer.decode([sample.context[i]]).strip().isdigit()]
    if digits[0] // size != digits[-1] // size:
        return "cut"
    return "inside" if needle.start // size == digits[0] // size else "sentence cut"


def samples(tokenizer: Any, size: int, keys: int) -> Iterator[tuple[str, Sample]]:
    """So many samples of each kind."""
    rng = random.Random(0)
    left = dict.fromkeys(KINDS, keys)
    for index in itertools.count():
        if not any(left.values()):
            return
        task = Passkey(tokenizer, depth=rng.random() * 0.6)
        sample = task.sample(index, CHUNKS * size)
        kind = kind_of(sample, tokenizer, size)
        if left[kind]:
            left[kind] -= 1
            yield kind, sample


def main() -> None:
    """Ask for each key, with each overlap, and count."""
    parser = argument_parser(__doc__)
    parser.add_argument("--model", default="smollm2-passkey")
    parser.add_argument("--keys", type=int, default=24, help="of each kind")
    parser.add_argument("--overlaps", type=int, nargs="+", default=[0, 8])
    args = parser.parse_args()
    for overlap in args.overlaps:
        model, tokenizer = cometlm.load(args.model, overlap=overlap)
        found = dict.fromkeys(KINDS, 0)
        for kind, sample in samples(tokenizer, model.config.comet_config.chunk_size, args.keys):
            session = Session(model, tokenizer)
            session.read(sample.context)
            (question,) = sample.questions
            (key,) = question.answers
            answer = answer_to(CometReader(session), question)
            found[kind] += answer == key
            mark = "found" if answer == key else "MISSED"
            print(f"overlap {overlap}  {kind:<12}  {key}  {answer!r}  {mark}", flush=True)
        counts = ", ".join(f"{kind} {hits} of {args.keys}" for kind, hits in found.items())
        print(f"overlap {overlap}: {counts}")


if __name__ == "__main__":
    main()
