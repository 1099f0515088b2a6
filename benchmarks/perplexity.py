"""Does a trained memory cost anything within a chunk, and does it help beyond?

    python benchmarks/perplexity.py [--model smollm2-passkey] [--tokens 32768]

Reads novels that were not trained with ("austen-test"). Within one chunk: perplexity of windows of
one chunk, of the model with an empty memory and of the untouched backbone. Beyond: perplexity of
tokens 2k to 32k of a novel, read with memory, and with the memory cleared at every chunk. Writes
out/perplexity.json.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import cometlm
from cometlm.checkpoints.source import Source
from cometlm.data.corpora import corpus_files
from common import argument_parser, machine, say, write

SKIPPED = 2048
BATCH = 8


@torch.no_grad()
def loss_of(model: Any, rows: Tensor) -> float:
    """Summed loss of all but the first token of rows [n, tokens]."""
    total = 0.0
    for part in rows.split(BATCH):
        logits = model(part, use_cache=False, logits_to_keep=0).logits[:, :-1].float()
        total += float(
            torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"
            )
        )
    return total


@torch.no_grad()
def loss_with_memory(model: Any, ids: Tensor, first: int) -> float:
    """Summed loss of tokens from `first` on, everything read in one go with memory."""
    labels = ids.clone()
    labels[:first] = -100
    return float(model(ids[None], labels=labels[None], num_items_in_batch=1, use_cache=False).loss)


def chunks(ids: Tensor, size: int, first: int) -> Tensor:
    """Windows [n, size + 1] whose last `size` tokens, together, are those from `first` on."""
    return ids[first - 1 :].unfold(0, size + 1, size)


def main() -> None:
    """Measure and print."""
    parser = argument_parser(__doc__)
    parser.add_argument("--model", default="smollm2-passkey")
    parser.add_argument("--tokens", type=int, default=32768)
    args = parser.parse_args()
    source = Source.resolve(args.model)
    model, tokenizer = cometlm.load(source)
    backbone = source.load_backbone(dtype=model.dtype).eval().to(model.device)
    size = model.config.comet_config.chunk_size
    novels = {}
    for path in corpus_files("austen-test"):
        text = path.read_text(encoding="utf-8")
        ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False)[: args.tokens + 1])
        ids = ids.to(model.device)
        rows = chunks(ids, size, SKIPPED)
        counted = rows.numel() - len(rows)
        say(f"{path.stem}: {SKIPPED + counted:,} tokens with memory …")
        with_memory = loss_with_memory(model, ids[: SKIPPED + counted], SKIPPED) / counted
        say(f"{path.stem}: {math.exp(with_memory):.2f}; with memory cleared at each chunk …")
        cleared = loss_of(model, rows) / counted
        within = rows[:64, :size]
        say(f"{path.stem}: {math.exp(cleared):.2f}; within a chunk, and the backbone …")
        ours, theirs = (loss_of(m, within) / (within.numel() - 64) for m in (model, backbone))
        novels[path.stem] = {
            "within_a_chunk": math.exp(ours),
            "within_a_chunk_backbone": math.exp(theirs),
            "within_ratio": math.exp(ours - theirs),
            "tokens": counted,
            "with_memory": math.exp(with_memory),
            "memory_cleared": math.exp(cleared),
            "beyond_ratio": math.exp(with_memory - cleared),
        }
    write(
        "perplexity",
        {
            "model": args.model,
            "machine": machine(),
            "novels": novels,
            "holds": {
                "within_ratio <= 1.02": all(n["within_ratio"] <= 1.02 for n in novels.values()),
                "beyond_ratio < 1": all(n["beyond_ratio"] < 1 for n in novels.values()),
            },
        },
    )


if __name__ == "__main__":
    main()
