"""Reading: tokens per second and peak memory, beside the same backbone with its own KV cache.

The backbone reads a text whole, in one call: only then does transformers leave out the mask, which
its fast kernels do not take. Where that does not fit into memory it reads in pieces, which the
fitted law leaves out.
"""

from __future__ import annotations

import contextlib
import statistics
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.profiler import profile, supported_activities

from cometlm import CometCache, CometConfig, CometForCausalLM
from cometlm.compat import CACHE, new_graph
from cometlm.planner.flops import chunk_cost
from gpu_parts.lab import Lab, limit
from gpu_parts.laws import full_attention_law
from gpu_parts.report import Entry, Report, TimeBox
from gpu_parts.scale import Scale, label

COUNTED = (
    "operations: twice the multiply-adds of the layers' matrix products and of attention's, causal "
    "attention as half of its square; without norms, the memory's own small products and the head. "
    "With memory: of chunks that meet a full one"
)
_STEADY = 32  # chunks that are timed with a full memory
_PIECE = 8192  # tokens that full attention reads at a time where a text does not fit whole
_SPARE = 3.0  # seconds left of a time box for what follows
_LONGEST = 16  # kernels of a profile that are named
_COMPILING = 90.0  # seconds that compiling may take


@dataclass
class Prefill:
    """Everything about reading with one shape."""

    lab: Lab
    report: Report
    shape: str
    scale: Scale = field(init=False)

    def __post_init__(self) -> None:
        self.scale = self.lab.scale

    def quick(self, box: TimeBox) -> None:
        """Short texts, and the steady state that the flat law follows."""
        for tokens in self.scale.quick:
            self._ours(tokens, box, rounds=3)
        self._steady(box)
        self._recorded(box)
        self._profile(box)
        for tokens in self.scale.quick:
            self._backbone(tokens, box, rounds=3)

    def long(self, box: TimeBox) -> None:
        """Long texts, then a million tokens as far as the time goes."""
        self._ours(self.scale.slow[-1], box, rounds=1)
        for tokens in self.scale.slow:
            self._backbone(tokens, box, rounds=1)
        self._million(box)
        self._compiled(box)

    # --- with memory ------------------------------------------------------------------------

    def _ours(self, tokens: int, box: TimeBox, rounds: int) -> None:
        def work() -> Entry:
            model = self._ready()
            self.lab.count_peak()
            seconds = [self.lab.timed(lambda: read(self.lab, model, tokens)) for _ in range(rounds)]
            return self._figures(tokens, min(seconds)) | {"rounds": seconds}

        needs = self._expected(tokens)
        self.report.measure(self._name("ours", label(tokens)), work, box, needs, tokens=tokens)

    def _steady(self, box: TimeBox) -> None:
        """Seconds of a chunk with a full memory: what a text of any length costs."""

        def work() -> Entry:
            return self._steady_figures(self._ready(), box)

        self.report.measure(self._name("ours", "steady"), work, box, chunks=_STEADY)

    def _recorded(self, box: TimeBox) -> None:
        """The steady state with each chunk replayed instead of launched."""
        name = self._name("ours", "steady recorded")
        if not self._can_record:
            self.report.skip(name, f"recorded: not available on {self.lab.device.type}")
            return

        def work() -> Entry:
            model = self._ready()
            with recorded_chunks(model):
                return self._steady_figures(model, box)

        self.report.measure(name, work, box, chunks=_STEADY)

    @property
    def _can_record(self) -> bool:
        return new_graph(self.lab.device) is not None

    def _steady_figures(self, model: CometForCausalLM, box: TimeBox) -> Entry:
        size = self.scale.comet.chunk_size
        past = read(self.lab, model, self.scale.filling * size)
        self.lab.count_peak()
        times: list[float] = []
        piece = self.scale.piece
        while len(times) * piece < _STEADY and (not times or box.left() > _SPARE):

            def go_on() -> None:
                nonlocal past
                past = read(self.lab, model, piece * size, past)

            times.append(self.lab.timed(go_on) / piece)
        seconds = statistics.median(times)
        config, comet = self.scale.config(self.shape), self.scale.comet
        multiplied = chunk_cost(config, comet).fast * config.num_hidden_layers
        return self._figures(size, seconds) | {
            "seconds_per_chunk": seconds,
            "chunks": len(times) * piece,
            "state_bytes": past.nbytes,
            "weights_bytes": self.lab.weights_bytes(model),
            **self._share(multiplied, seconds),
        }

    def _profile(self, box: TimeBox) -> None:
        """What a chunk with a full memory is made of: its kernels, and how long Python launches."""

        def work() -> Entry:
            model, size = self._ready(), self.scale.comet.chunk_size
            past = read(self.lab, model, self.scale.filling * size)
            chunks = self.scale.piece
            self.lab.wait()
            with profile(activities=supported_activities()) as seen:
                start = time.perf_counter()
                read(self.lab, model, chunks * size, past)
                launched = time.perf_counter() - start
                self.lab.wait()
                whole = time.perf_counter() - start
            return {
                "seconds_per_chunk": whole / chunks,
                "launching_per_chunk": launched / chunks,
                **kernels(seen, self.lab.device, chunks),
            }

        self.report.measure(f"kernels/{self.shape}/reading", work, box, chunks=self.scale.piece)

    def _million(self, box: TimeBox) -> None:
        """Read on until it is a million tokens, or the time is over and the flat law takes over.

        With recorded chunks, where there were figures of them.
        """
        is_recorded = self.report.figures(self._name("ours", "steady recorded")) is not None

        def work() -> Entry:
            with recorded_chunks(self._ready()) if is_recorded else contextlib.nullcontext():
                return read_on() | {"recorded": is_recorded}

        def read_on() -> Entry:
            model, size = self._ready(), self.scale.comet.chunk_size
            piece, past, done, spent = self.scale.piece * size, None, 0, 0.0
            last = 0.0
            self.lab.count_peak()
            while done < self.scale.million and box.left() > _SPARE + 2 * last:
                now = min(piece, self.scale.million - done)

                def go_on(now: int = now) -> None:
                    nonlocal past
                    past = read(self.lab, model, now, past)

                last = self.lab.timed(go_on)
                done, spent = done + now, spent + last
            whole = done == self.scale.million
            if past is None:
                raise RuntimeError("no time was left to read anything")
            if whole:
                self.lab.states["million"] = past
            rest = (self.scale.million - done) * last / piece
            return self._figures(self.scale.million, spent + rest) | {
                "read_tokens": done,
                "read_seconds": spent,
                "basis": "really read" if whole else "flat law from the last chunks that were read",
                "state_bytes": past.nbytes,
                "weights_bytes": self.lab.weights_bytes(model),
            }

        name = self._name("ours", label(self.scale.million))
        self.report.measure(name, work, box, tokens=self.scale.million)

    def _compiled(self, box: TimeBox) -> None:
        """The steady state with every cell through `torch.compile`; an extra."""
        name = self._name("ours", "steady compiled")
        if self.scale.paper and self.lab.device.type == "cpu":
            self.report.skip(name, "compiled only for an accelerator")
            return

        def work() -> Entry:
            model = self._ready()
            options = {} if self.scale.paper else {"backend": "eager"}
            try:
                with torch.no_grad(), limit(min(_COMPILING, box.left())):
                    if not model.model.compile_cells(**options):
                        raise RuntimeError("the cells could not be compiled")
                    read(self.lab, model, (self.scale.filling + 2) * self.scale.comet.chunk_size)
                return self._steady_figures(model, box)
            finally:
                self.lab.detach()  # the next model's cells are as they were
                torch.compiler.reset()

        needs = 0.3 * _COMPILING * self.scale.paper
        self.report.measure(name, work, box, needs, chunks=_STEADY)

    def _ready(self) -> CometForCausalLM:
        """The model, warm: it has read with an empty, a part-full and a full memory."""
        model = self.lab.model(self.shape)
        chunks = self.scale.filling + 1
        size = self.scale.comet.chunk_size
        self.lab.warm("reading", lambda: read(self.lab, model, chunks * size))
        return model

    def _expected(self, tokens: int) -> float | None:
        steady = self.report.figures(self._name("ours", "steady"))
        return tokens / steady["tokens_per_second"] if steady else None

    # --- the backbone's own -----------------------------------------------------------------

    def _backbone(self, tokens: int, box: TimeBox, rounds: int) -> None:
        def work() -> Entry:
            model = self.lab.backbone(self.shape)
            short = self.lab.ids(1, self.scale.comet.chunk_size, self.shape)
            self.lab.warm("backbone", lambda: full_attention(model, short))
            ids = self.lab.ids(1, tokens, self.shape)
            found = self._whole(model, ids, rounds)
            if found is None:  # out here nothing of what did not fit is alive any more
                self.lab.count_peak()
                seconds = [self.lab.timed(lambda: full_attention(model, ids, _PIECE))]
                found = self._figures(tokens, seconds[0]) | {"whole": False, "rounds": seconds}
            return found

        law = full_attention_law(self.report.entries, self.shape)
        needs = law["a"] * tokens + law["b"] * tokens**2 if law else None
        name = self._name("backbone", label(tokens))
        self.report.measure(name, work, box, needs, tokens=tokens)

    def _whole(self, model: Any, ids: Tensor, rounds: int) -> Entry | None:
        """Figures of reading in one call, or None where that does not fit."""
        self.lab.count_peak()
        try:
            seconds = [self.lab.timed(lambda: full_attention(model, ids)) for _ in range(rounds)]
        except torch.OutOfMemoryError:
            return None
        found = self._figures(ids.shape[1], min(seconds))
        config = self.scale.config(self.shape)
        plain = CometConfig(chunk_size=ids.shape[1], global_memory=False, temporary_memory=False)
        multiplied = chunk_cost(config, plain).fast * config.num_hidden_layers  # one chunk holds it
        share = self._share(multiplied, min(seconds))
        return found | {"whole": True, "rounds": seconds} | share

    # --- both -------------------------------------------------------------------------------

    def _share(self, multiplied: int, seconds: float) -> dict[str, float]:
        """Operations by counting (`COUNTED`), and which share of the device's peak that is."""
        rate, peak = 2 * multiplied / seconds, self.report.figures("peak/matrix")
        found = {"flops": 2.0 * multiplied, "tflops": rate / 1e12}
        return found | ({"share_of_peak": rate / peak["flops"]} if peak else {})

    def _figures(self, tokens: int, seconds: float) -> Entry:
        return {
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "peak_bytes": self.lab.peak(),
        }

    def _name(self, whose: str, what: str) -> str:
        return f"prefill/{self.shape}/{whose}/{what}"


@contextlib.contextmanager
def recorded_chunks(model: CometForCausalLM) -> Iterator[None]:
    """While it is open, chunks with a full memory are recorded; what cannot be is an error."""
    model.model.record_chunks()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="chunks are not recorded")
            yield
    finally:
        model.model.record_chunks(False)


def kernels(seen: profile, device: torch.device, chunks: int) -> Entry:
    """What a profile saw of a device: how many kernels, their seconds, and the longest of them.

    On a CPU, operations in the place of kernels.
    """
    on_cpu = device.type == "cpu"
    names: dict[str, list[float]] = {}
    for event in seen.events():
        if (event.device_type.name == "CPU") != on_cpu:
            continue
        own = event.self_cpu_time_total if on_cpu else event.self_device_time_total
        names.setdefault(event.name, []).append(own / 1e6)
    longest = sorted(names.items(), key=lambda pair: -sum(pair[1]))[:_LONGEST]
    return {
        "kernels_per_chunk": sum(map(len, names.values())) / chunks,
        "busy_per_chunk": sum(map(sum, names.values())) / chunks,
        "longest": [
            {"name": name[:160], "per_chunk": len(x) / chunks, "seconds_per_chunk": sum(x) / chunks}
            for name, x in longest
        ],
    }


@torch.no_grad()
def read(
    lab: Lab, model: CometForCausalLM, tokens: int, past: CometCache | None = None
) -> CometCache:
    """Read random tokens, a few chunks a call; a chunk that is full at the end is closed."""
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    piece = lab.scale.piece * lab.scale.comet.chunk_size
    vocabulary = model.config.vocab_size
    for start in range(0, tokens, piece):
        ids = torch.randint(vocabulary, (1, min(piece, tokens - start)), device=lab.device)
        out = model(ids, past_key_values=past, use_cache=True, logits_to_keep=1, close_last=True)
        past = out.past_key_values
    assert past is not None
    return past


@torch.no_grad()
def full_attention(model: Any, ids: Tensor, piece: int | None = None) -> None:
    """The backbone reads ids [1, N] into its own cache, whole or in pieces."""
    past = None
    for part in ids.split(piece or ids.shape[1], dim=1):
        out = model(input_ids=part, use_cache=True, logits_to_keep=1, **{CACHE: past})
        past = getattr(out, CACHE)
