"""Writing: milliseconds of a token after some text, in every way there is to write.

`eager` calls the model with the cache that the last call returned; `fixed` writes into the buffers
of a `FixedCache`; `recorded` replays what the device recorded of that. `backbone` is the same
backbone with transformers' own growing cache, and `compiled` with its static one under
`torch.compile`.

A window of steps lies inside one chunk. What closing a chunk costs is timed apart, by a window that
crosses a border, and spread over a whole chunk.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from cometlm import CometCache
from cometlm.compat import CACHE, new_graph
from cometlm.core.fixed_cache import FixedCache
from gpu_parts.lab import Lab, limit
from gpu_parts.prefill import read
from gpu_parts.report import Entry, Report, TimeBox
from gpu_parts.scale import Scale, label

Step = Callable[[Tensor], Tensor]  # ids [B, N] to logits [B, V] of what follows

_OURS = ("recorded", "fixed", "eager")
_BORDERS_UP_TO = 4  # rows: reading up to a border in more of them takes longer than it tells
_COMPILING = 120.0  # seconds that compiling may take
_SPARE_CHUNKS = 2  # that are read with a full memory where a million tokens are not read


@dataclass
class Decode:
    """Everything about writing with one shape."""

    lab: Lab
    report: Report
    shape: str
    scale: Scale = field(init=False)

    def __post_init__(self) -> None:
        self.scale = self.lab.scale

    def quick(self, box: TimeBox) -> None:
        """One row, after the fewest tokens and with a full memory; first what is compared first."""
        short, million = self.scale.decoded[0], self.scale.million
        recorded, *others = _OURS
        for tokens in (short, million):
            self._ours(tokens, 1, recorded, box)
        self._backbone(short, 1, box)
        for way in others:
            for tokens in (short, million):
                self._ours(tokens, 1, way, box)

    def long(self, box: TimeBox) -> None:
        """More rows, texts of a middle length, and the million again if it was really read."""
        short, *middle = self.scale.decoded
        million = self.scale.million
        if "million" in self.lab.states:
            self._ours(million, 1, "recorded", box, really=True)
            self._ours(million, 1, "fixed", box, really=True)
        for batch in self.scale.batches[1:]:
            for tokens in (million, short):
                self._ours(tokens, batch, "recorded", box)
        for tokens in middle:
            for way in _OURS:
                self._ours(tokens, 1, way, box)
            self._backbone(tokens, 1, box)
        for batch in self.scale.batches[1:]:
            self._backbone(short, batch, box)
            for tokens in (million, short):
                for way in ("fixed", "eager"):
                    self._ours(tokens, batch, way, box)
            for tokens in middle:
                self._backbone(tokens, batch, box)
                for way in _OURS:
                    self._ours(tokens, batch, way, box)
        for tokens in self.scale.decoded:
            self._compiled(tokens, box)
        self._impossible(million)

    # --- with memory ------------------------------------------------------------------------

    def _ours(self, tokens: int, batch: int, way: str, box: TimeBox, really: bool = False) -> None:
        name = self._name(tokens, batch, way) + (" really read" if really else "")
        if way == "recorded" and new_graph(self.lab.device) is None:
            self.report.skip(name, f"recorded: not available on {self.lab.device.type}")
            return

        def work() -> Entry:
            state = self._state(tokens)
            self.lab.count_peak()
            rows = state.select([0] * batch)
            origin = self._origin(rows, tokens)
            if way == "eager":
                return self._timed(_Eager(self._model, rows), batch, rows) | origin
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                cache = FixedCache(self._model, rows, record=way == "recorded")
                found = self._timed(cache.read, batch, rows)
            said = [str(x.message) for x in caught if "not recorded" in str(x.message)]
            if said:
                raise RuntimeError(said[0])
            return found | origin

        self.report.measure(name, work, box, tokens=tokens, batch=batch, way=way)

    @property
    def _model(self) -> Any:
        return self.lab.model(self.shape)

    def _state(self, tokens: int) -> CometCache:
        """One row after so many tokens and half a chunk more, which is open."""
        size, million = self.scale.comet.chunk_size, tokens == self.scale.million
        really = million and "million" in self.lab.states
        key = "decode/million" if really else f"decode/{tokens}"
        if key in self.lab.states:
            return self.lab.states[key]
        if really:
            closed: CometCache | None = self.lab.states["million"]
        elif tokens < size:
            closed = None
        else:
            chunks = self.scale.filling + _SPARE_CHUNKS if million else tokens // size
            closed = read(self.lab, self._model, chunks * size)
        ids = self.lab.ids(1, size // 2, self.shape)
        with torch.no_grad():
            out = self._model(ids, past_key_values=closed, use_cache=True, logits_to_keep=1)
        state: CometCache = out.past_key_values
        self.lab.states[key] = state
        return state

    def _origin(self, rows: CometCache, tokens: int) -> dict[str, Any]:
        really = rows.tokens_read >= tokens
        flat = "flat: a full memory is of one size after any text, so fewer tokens were read"
        return {"read_tokens": rows.tokens_read, "state": "really read" if really else flat}

    def _timed(self, step: Step, batch: int, rows: CometCache) -> Entry:
        """Windows inside the open chunk, and for few rows one across its border."""
        stride, size = self.scale.comet.stride, self.scale.comet.chunk_size
        ids = self.lab.ids(batch, 1, self.shape)
        ids = steps(step, ids, 2 * stride)
        found, ids = self._windows(step, ids, batch)
        if batch > _BORDERS_UP_TO:
            return found
        at = rows.rows[0].text + 2 * stride + self.scale.windows * self.scale.steps
        crossing = 0.0
        for _ in range(2):  # the first one chooses kernels
            ids = self._up_to_border(step, size - stride - at, batch)
            crossing = self.lab.timed(partial(steps, step, ids, 2 * stride))
            at = stride
        border = max(0.0, 1000 * crossing - 2 * stride * found["ms_per_token"])
        whole = found["ms_per_token"] + border / size
        return found | {"border_ms": border, "ms_per_token_whole_chunk": whole}

    def _up_to_border(self, step: Step, tokens: int, batch: int) -> Tensor:
        with torch.no_grad():
            return step(self.lab.ids(batch, tokens, self.shape)).argmax(-1, keepdim=True)

    # --- the backbone's own -----------------------------------------------------------------

    def _backbone(self, tokens: int, batch: int, box: TimeBox) -> None:
        def work() -> Entry:
            model = self.lab.backbone(self.shape)
            self.lab.count_peak()
            cache = DynamicCache(config=model.config)
            self._fill(cache, tokens, batch)

            def step(ids: Tensor) -> Tensor:
                out = model(input_ids=ids, use_cache=True, logits_to_keep=1, **{CACHE: cache})
                logits: Tensor = out.logits[:, -1]
                return logits

            ids = steps(step, self.lab.ids(batch, 1, self.shape), 4)
            return self._windows(step, ids, batch)[0]

        name = self._name(tokens, batch, "backbone")
        self.report.measure(name, work, box, tokens=tokens, batch=batch, way="backbone")

    def _compiled(self, tokens: int, box: TimeBox) -> None:
        name = self._name(tokens, 1, "compiled")
        if self.scale.paper and self.lab.device.type == "cpu":
            self.report.skip(name, "compiled only for an accelerator")
            return
        mode: Any = {"mode": "reduce-overhead"} if self.scale.paper else {"backend": "eager"}

        def work() -> Entry:
            model: Any = self.lab.backbone(self.shape)
            self.lab.count_peak()
            room = 16 + self.scale.windows * self.scale.steps
            cache = StaticCache(config=model.config, max_cache_len=tokens + room)
            self._fill(cache, tokens, 1)
            forward = torch.compile(model.forward, **mode)

            def step(ids: Tensor) -> Tensor:
                out = forward(input_ids=ids, use_cache=True, logits_to_keep=1, **{CACHE: cache})
                logits: Tensor = out.logits[:, -1]
                return logits

            try:
                with limit(min(_COMPILING, box.left())):
                    ids = steps(step, self.lab.ids(1, 1, self.shape), 8)
                    return self._windows(step, ids, 1)[0] | {"compiled": mode}
            finally:
                torch.compiler.reset()

        needs = 0.3 * _COMPILING * self.scale.paper
        self.report.measure(name, work, box, needs, tokens=tokens, batch=1, way="compiled")

    def _fill(self, cache: Any, tokens: int, batch: int) -> None:
        """Random keys and values: what they are changes no time."""
        fields = self.scale.shapes[self.shape]
        shape = (batch, fields["num_key_value_heads"], tokens, fields["head_dim"])
        for layer in range(fields["num_hidden_layers"]):
            key, value = (
                torch.randn(shape, device=self.lab.device, dtype=self.lab.dtype) for _ in range(2)
            )
            cache.update(key, value, layer)

    def _impossible(self, tokens: int) -> None:
        """Full attention after a million tokens: by counting only."""
        needed = self.scale.cache_bytes(self.shape, tokens, self.lab.dtype.itemsize)
        said = f"its KV cache would be {needed / 2**30:.0f} GiB by counting"
        self.report.skip(self._name(tokens, 1, "backbone"), said, tokens=tokens, batch=1)

    # --- all --------------------------------------------------------------------------------

    def _windows(self, step: Step, ids: Tensor, batch: int) -> tuple[Entry, Tensor]:
        times = []
        for _ in range(self.scale.windows):

            def run() -> None:
                nonlocal ids
                ids = steps(step, ids, self.scale.steps)

            times.append(1000 * self.lab.timed(run) / self.scale.steps)
        median = statistics.median(times)
        found = {
            "ms_per_token": median,
            "ms_of_windows": times,
            "steps_of_a_window": self.scale.steps,
            "tokens_per_second": 1000 * batch / median,
            "peak_bytes": self.lab.peak(),
        }
        return found, ids

    def _name(self, tokens: int, batch: int, way: str) -> str:
        return f"decode/{self.shape}/{label(tokens)}/batch {batch}/{way}"


class _Eager:
    """Steps of the model, each from the cache that the last one returned."""

    def __init__(self, model: Any, cache: CometCache) -> None:
        self._model = model
        self._cache = cache

    def __call__(self, ids: Tensor) -> Tensor:
        out = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        logits: Tensor = out.logits[:, -1]
        return logits


@torch.no_grad()
def steps(step: Step, ids: Tensor, count: int) -> Tensor:
    """Write greedily; nothing here waits for the device."""
    for _ in range(count):
        ids = step(ids).argmax(-1, keepdim=True)
    return ids
