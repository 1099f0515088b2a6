"""Does a model with a memory still say what its backbone says, before it has anything to remember?

    python benchmarks/language.py [--model smollm2] [--rows 16] [--prompts 50]

All within a chunk and with an empty memory, on texts that were held out: novels ("austen-test") and
prompts of the split "test". For each kind: KL(backbone ‖ model) in nats a token, and the
perplexity, of the novels and of the backbone's own greedy answers, as a multiple of the backbone's.
Then everyday prompts are asked in an empty session each: how many answers are empty, and how long
they are beside the backbone's. Writes out/language.json.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

import torch

import cometlm
from cometlm.checkpoints.source import Source
from cometlm.data.prompts import prompts_of
from cometlm.train.config import Keep
from cometlm.train.keep import (
    Answered,
    KeepBatches,
    Rows,
    divergence,
    own_answers,
    prompt_ids,
)
from common import argument_parser, machine, say, write

ANSWER = 64  # tokens
PROSE = "austen-test"


@torch.no_grad()
def beside(model: Any, backbone: Any, batches: Iterable[Rows]) -> dict[str, float]:
    """How far a model is from its backbone on the tokens that are counted."""
    nats, ours_loss, theirs_loss, count = 0.0, 0.0, 0.0, 0
    for rows in batches:
        ids = rows.ids.to(model.device)
        # The last token of a row has no next one that could be a label.
        counted, labels = rows.counted[:, :-1], ids[:, 1:][rows.counted[:, :-1]]
        ours, theirs = (
            one(ids, use_cache=False, logits_to_keep=0).logits[:, :-1][counted]
            for one in (model, backbone)
        )
        nats += float(divergence(theirs, ours).sum())
        ours_loss, theirs_loss = (
            total + float(torch.nn.functional.cross_entropy(x.float(), labels, reduction="sum"))
            for total, x in ((ours_loss, ours), (theirs_loss, theirs))
        )
        count += len(labels)
    return {
        "tokens": count,
        "kl": nats / count,
        "perplexity": math.exp(ours_loss / count),
        "perplexity_backbone": math.exp(theirs_loss / count),
        "perplexity_ratio": math.exp((ours_loss - theirs_loss) / count),
    }


def prose(tokenizer: Any, size: int, rows: int) -> list[Rows]:
    """Chunks of novels that were held out."""
    settings = Keep(tokens=size, prose_share=1.0, corpora=(PROSE,))
    batches = KeepBatches(settings, tokenizer, [], size, seed=1)
    return [row for number in range(rows) for row in batches[number]]


def dialogue(answered: Iterable[Answered]) -> list[Rows]:
    """A row for each prompt and the backbone's answer, which is what counts."""
    rows = []
    for one in answered:
        ids = torch.tensor([one.asked + one.answer])
        counted = torch.zeros_like(ids, dtype=torch.bool)
        counted[:, len(one.asked) - 1 : -1] = True
        rows.append(Rows(ids, counted))
    return rows


def answers(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """What the model says to each of them in a session of its own."""
    said = []
    for number, prompt in enumerate(prompts):
        say(f"prompt {number + 1} of {len(prompts)} …")
        said.append(model.session(tokenizer).chat(prompt, max_new_tokens=ANSWER))
    return said


def main() -> None:
    """Measure and print."""
    parser = argument_parser(__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rows", type=int, default=16, help="chunks of prose")
    parser.add_argument("--prompts", type=int, default=50, help="of each kind, at most")
    args = parser.parse_args()
    source = Source.resolve(args.model)
    model, tokenizer = cometlm.load(source)
    backbone = source.load_backbone(dtype=model.dtype).eval().to(model.device)
    size = model.config.comet_config.chunk_size
    result: dict[str, Any] = {"model": args.model, "machine": machine(), "chunk": size}
    say(f"{args.rows} chunks of prose …")
    result["prose"] = beside(model, backbone, prose(tokenizer, size, args.rows))
    everyday = prompts_of("everyday", "test")[: args.prompts]
    theirs: list[list[int]] = []
    for name in ("everyday", "knowledge", "faq"):
        prompts = prompts_of(name, "test")[: args.prompts]
        say(f"{len(prompts)} {name} prompts …")
        asked = [prompt_ids(tokenizer, prompt) for prompt in prompts]
        said = own_answers(backbone, tokenizer, asked, ANSWER)
        theirs = theirs or said
        answered = [Answered(q, a) for q, a in zip(asked, said, strict=True) if a]
        result[name] = beside(model, backbone, dialogue(answered))
    ours = answers(model, tokenizer, everyday)
    words = [tokenizer.decode(ids, skip_special_tokens=True) for ids in theirs]
    result["answers"] = {
        "prompts": len(everyday),
        "empty": sum(not text.strip() for text in ours),
        "empty_backbone": sum(not text.strip() for text in words),
        "words": statistics.mean(len(text.split()) for text in ours),
        "words_backbone": statistics.mean(len(text.split()) for text in words),
        "said": [
            {"prompt": prompt, "model": mine, "backbone": its}
            for prompt, mine, its in zip(everyday, ours, words, strict=True)
        ],
    }
    result["holds"] = {"no empty answer": result["answers"]["empty"] == 0}
    write("language", result)


if __name__ == "__main__":
    main()
