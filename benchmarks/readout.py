"""What do readout tokens say at the end of a chunk: the key that it tells, or what hay has?

    python benchmarks/readout.py [--model smollm2] [--texts 12]

A memory that keeps numbers is trained to let its readout tokens spell a key where a text tells one
(`told_weight` of a stage), and with `silent_hay` to say the end of a text elsewhere. Here the
backbone's head is asked for each of them, in texts of four chunks that a new memory reads. Keys,
hay and wordings are none of the training. A token that spells a number of the hay looks to the
gates much like one that spells a key.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import cometlm
from cometlm.core.model import CometModel
from cometlm.data.corpora import text_files
from cometlm.data.hay import FileHay, Hay, PassageHay
from cometlm.data.passkey import PasskeyTask
from cometlm.data.wordings import MEASURING
from cometlm.eval.passkey import HAY
from common import argument_parser

CHUNKS = 4


def hays(tokenizer: Any) -> dict[str, Hay]:
    """The hay of the passkey test, and passages of it around numbers."""
    found: dict[str, Hay] = {name: FileHay(tokenizer, text_files(name)) for name in HAY}
    found["python, numbers"] = PassageHay(tokenizer, text_files("python"))
    return found


class Readouts:
    """What the readout tokens of a model say [M], chunk by chunk."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._text: CometModel = model.model
        self._outputs: list[Tensor] = []
        self._text.cells[-1].layer.register_forward_hook(
            lambda layer, args, output: self._outputs.append(output)
        )

    @torch.no_grad()
    def of(self, ids: list[int]) -> Iterator[Tensor]:
        """Read a text whose every chunk closes."""
        self._outputs.clear()
        self._text(torch.tensor([ids], device=self._model.device), use_cache=False, close_last=True)
        slots = self._text.config.comet_config.global_slots
        for output in self._outputs:
            # Readout tokens are the last items of a chunk that closes.
            said = self._model.logits(self._text.norm(output[:, -slots:]))
            yield said[0].argmax(-1).cpu()


def in_hay(readouts: Readouts, hay: Hay, chance: random.Random, texts: int, size: int) -> Tensor:
    """What they say in texts that tell no key."""
    drawn = [hay.draw(chance, CHUNKS * size) for _ in range(texts)]
    return torch.cat([words for ids in drawn for words in readouts.of(ids)])


def spelled(
    readouts: Readouts, task: PasskeyTask, chance: random.Random, texts: int, size: int
) -> list[bool]:
    """Whether they spell the key at the end of its chunk, for each key that no border cuts."""
    found = []
    for _ in range(texts):
        sample = task.draw(chance, CHUNKS * size, chance.random() * 0.7, asked=False)
        place = (sample.said.stop - 1) // size
        if sample.said.start // size == place:
            *_, chunk = readouts.of(sample.text[: (place + 1) * size])
            text = "".join(task.tokenizer.batch_decode(chunk[:, None]))
            found.append(text.startswith(sample.key))
    return found


def main() -> None:
    """Count what they say in each hay, with and without a key."""
    parser = argument_parser(__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--texts", type=int, default=12, help="of each hay, and as many with a key")
    args = parser.parse_args()
    if args.texts < 1:
        parser.error(f"--texts must be at least 1, got {args.texts}")
    model, tokenizer = cometlm.load(args.model, overlap=0)
    model.eval()
    sizes = model.config.comet_config
    if not sizes.global_slots:
        raise SystemExit(f"{args.model} has no global memory, and so no readout tokens")
    readouts = Readouts(model)
    for name, hay in hays(tokenizer).items():
        chance = random.Random(f"0/{name}")
        words = in_hay(readouts, hay, chance, args.texts, sizes.chunk_size)
        digits = [text.strip().isdecimal() for text in tokenizer.batch_decode(words[:, None])]
        silent = (words == tokenizer.eos_token_id).float().mean()
        task = PasskeyTask(tokenizer, hay, MEASURING, digits=(5, 5))
        right = spelled(readouts, task, chance, args.texts, sizes.chunk_size)
        print(
            f"{name:<16} hay: digits {sum(digits) / len(digits):.2f}, silence {silent:.2f} of "
            f"{len(digits)}   keys spelled: {sum(right)} of {len(right)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
