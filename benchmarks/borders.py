"""Keys that a chunk's border cuts: are they found, with and without an overlap of chunks?

    python benchmarks/borders.py [--model smollm2] [--keys 24] [--overlaps 0 8]

Keys, hay and wordings are none of the training; a text has three chunks, and the key stands before
its last third. "inside" are keys in one chunk, "cut" those whose digits a border of fixed chunks
parts, "sentence cut" those where it parts the digits from the words before.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import cometlm
from cometlm.data.corpora import text_files
from cometlm.data.hay import FileHay
from cometlm.data.passkey import PasskeySample, PasskeyTask
from cometlm.data.wordings import MEASURING
from cometlm.eval.passkey import HAY, said
from cometlm.session.session import Session
from common import argument_parser

KINDS = ("inside", "sentence cut", "cut")
CHUNKS = 3


def kind_of(sample: PasskeySample, tokenizer: Any, size: int) -> str:
    """How the border of fixed chunks stands to a sample's key."""
    digits = [i for i in sample.said if tokenizer.decode([sample.text[i]]).strip().isdigit()]
    if digits[0] // size != digits[-1] // size:
        return "cut"
    return "inside" if sample.said.start // size == digits[0] // size else "sentence cut"


def samples(tokenizer: Any, size: int, keys: int) -> Iterator[tuple[str, PasskeySample]]:
    """So many samples of each kind."""
    chance = random.Random(0)
    tasks = [PasskeyTask(tokenizer, FileHay(tokenizer, text_files(h)), MEASURING) for h in HAY]
    left = dict.fromkeys(KINDS, keys)
    while any(left.values()):
        sample = chance.choice(tasks).draw(chance, CHUNKS * size, chance.random() * 0.6)
        kind = kind_of(sample, tokenizer, size)
        if left[kind]:
            left[kind] -= 1
            yield kind, sample


def main() -> None:
    """Ask for each key, with each overlap, and count."""
    parser = argument_parser(__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--keys", type=int, default=24, help="of each kind")
    parser.add_argument("--overlaps", type=int, nargs="+", default=[0, 8])
    args = parser.parse_args()
    for overlap in args.overlaps:
        model, tokenizer = cometlm.load(args.model, overlap=overlap)
        found = dict.fromkeys(KINDS, 0)
        for kind, sample in samples(tokenizer, model.config.comet_config.chunk_size, args.keys):
            session = Session(model, tokenizer)
            session.read(sample.text)
            answer = said(session, sample)
            found[kind] += answer == sample.key
            mark = "found" if answer == sample.key else "MISSED"
            print(f"overlap {overlap}  {kind:<12}  {sample.key}  {answer!r}  {mark}", flush=True)
        counts = ", ".join(f"{kind} {hits} of {args.keys}" for kind, hits in found.items())
        print(f"overlap {overlap}: {counts}")


if __name__ == "__main__":
    main()
