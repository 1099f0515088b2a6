"""Decoding: a step against the plain backbone's, batches, and memory while writing on and on.

    python benchmarks/decode.py [--tokens 20000] [--only step batch session_file writing]

SmolLM2 at chunk 512, m 64, capacity 512 with its memory full, over one whole chunk so that the
fold is in it, against the plain backbone with 2,048 tokens of KV cache; both in turn, 64 steps at a
time, weights packed for both where the CPU gains by it. Beside them stands the time in which memory
gives all weights once. Then batch 8 against batch 1; the size of a session file; and the process's
peak while writing --tokens tokens against that after a tenth of them. Writes out/decode.json.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cometlm
from cometlm.compat import CACHE
from cometlm.device import peak_memory, readable_bytes, reset_peak_memory
from common import argument_parser, machine, program_text, weights_once, write

_PLAIN_CACHE = 2048
_BLOCK = 64


class Decoder:
    """Greedy steps of any model with a cache, a block at a time, each block timed."""

    def __init__(self, forward: Callable[..., Any], ids: Tensor, cache: Any) -> None:
        self._forward = forward
        self._ids = ids
        self.cache = cache
        self.seconds = 0.0
        self.steps = 0

    def run(self, steps: int) -> None:
        """Decode so many tokens."""
        start = time.perf_counter()
        for _ in range(steps):
            past = {CACHE: self.cache}
            out = self._forward(self._ids, use_cache=True, logits_to_keep=1, **past)
            self.cache, self._ids = getattr(out, CACHE), out.logits[:, -1:].argmax(-1)
        self.seconds += time.perf_counter() - start
        self.steps += steps

    @property
    def step_ms(self) -> float:
        """Mean milliseconds of a step."""
        return 1000 * self.seconds / self.steps


def against_the_backbone(model: cometlm.CometForCausalLM, ids: Tensor) -> dict[str, Any]:
    """Milliseconds of a step, the fold amortised, and of the plain backbone's; their ratio."""
    sizes = model.config.comet_config
    packed = model.pack_weights()  # for both: they share their layers
    ours = Decoder(model, ids[:, -1:], model(ids, logits_to_keep=1).past_key_values)
    # While attached the backbone runs by itself as plain sdpa, which is its own implementation.
    backbone = model._backbone
    read = backbone(ids[:, :_PLAIN_CACHE], use_cache=True, logits_to_keep=1)
    past = getattr(read, CACHE)
    plain = Decoder(backbone, ids[:, -1:], past)
    for decoder in (ours, plain):  # warm
        decoder.run(8)
        decoder.seconds, decoder.steps = 0.0, 0
    plain.cache.crop(-8)
    for _ in range(sizes.chunk_size // _BLOCK):
        ours.run(_BLOCK)
        plain.run(_BLOCK)
        plain.cache.crop(-_BLOCK)
    return {
        "step_ms": ours.step_ms,
        "backbone_step_ms": plain.step_ms,
        "ratio": ours.step_ms / plain.step_ms,
        "weights_once": weights_once(model),
        "packed_bytes": packed,
        "holds": ours.step_ms <= 1.2 * plain.step_ms,
    }


def batches(model: cometlm.CometForCausalLM, ids: Tensor) -> dict[str, Any]:
    """Tokens/s of batch 8 over those of batch 1, in turn."""
    decoders = {}
    for size in (1, 8):
        batch = torch.cat([ids.roll(b, dims=1) for b in range(size)])
        cache = model(batch, logits_to_keep=1).past_key_values
        decoders[size] = Decoder(model, batch[:, -1:], cache)
    for _ in range(4):
        for decoder in decoders.values():
            decoder.run(_BLOCK)
    rates = {size: 1000 * size / decoder.step_ms for size, decoder in decoders.items()}
    return {
        "tokens_per_second": rates,
        "ratio": rates[8] / rates[1],
        "holds": rates[8] >= 4 * rates[1],
    }


def session_size(model: cometlm.CometForCausalLM, tokenizer: Any) -> dict[str, Any]:
    """Bytes of a session file with a full memory."""
    session = model.session(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        for stats in session.reading(program_text()):
            if stats.chunks == 12:
                break
        session.save(Path(folder) / "session")
        size = (Path(folder) / "session").stat().st_size
    return {"bytes": size, "dtype": str(model.dtype), "holds": size <= 40e6}


def while_writing(model: cometlm.CometForCausalLM, ids: Tensor, total: int) -> dict[str, Any]:
    """Peak memory after a tenth of the tokens and after all of them, through generate().

    The prompt fills the memory first, so that what grows afterwards is not the memory itself.
    """
    reset_peak_memory(model.device)
    peaks: dict[int, int] = {}

    class Listener:
        """A streamer that notes the peak."""

        def __init__(self) -> None:
            self.count = -1  # the prompt comes first
            self.start = time.perf_counter()

        def put(self, value: Tensor) -> None:
            self.count += 1
            if self.count in (total // 10, total):
                peaks[self.count] = peak_memory(model.device)
            if self.count % (total // 10) == 0 and self.count:
                rate = self.count / (time.perf_counter() - self.start)
                peak = readable_bytes(peak_memory(model.device))
                print(f"{self.count:>9,} tokens  {rate:,.0f}/s  {peak}", file=sys.stderr)

        def end(self) -> None:
            pass

    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=total,
        eos_token_id=None,
        do_sample=False,
        streamer=Listener(),
    )
    early, late = peaks[total // 10], peaks[total]
    return {"peak_bytes": peaks, "ratio": late / early, "holds": late <= 1.02 * early}


def main() -> None:
    """Measure and print; exit 1 if a figure does not hold."""
    parser = argument_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--only", nargs="+", default=["step", "batch", "session_file", "writing"])
    args = parser.parse_args()
    model, tokenizer = cometlm.load("smollm2", seed=0)  # with the sizes that the figures are of
    text = "".join(islice(program_text(), 6))
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : 512 * 10 + 1].to(model.device)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "step": lambda: against_the_backbone(model, ids),
        "batch": lambda: batches(model, ids),
        "session_file": lambda: session_size(model, tokenizer),
        "writing": lambda: while_writing(model, ids, args.tokens),
    }
    result: dict[str, Any] = {"machine": machine(), "dtype": str(model.dtype)}
    with torch.no_grad():
        result |= {name: parts[name]() for name in args.only}
    write("decode", result)
    sys.exit(not all(result[name]["holds"] for name in args.only))


if __name__ == "__main__":
    main()
