"""The decoder with memory: text of any length in, last hidden states out, memory of one chunk.

A backbone is taken apart into cells, and the module `comet` stands beside them.

Footguns:
    - Positions of padding give zeros as hidden states, so their logits mean nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from cometlm.backbone import (
    Parts,
    RotaryTable,
    device_of,
    layer_type,
    rotary_tables,
)
from cometlm.batch import TextBatch
from cometlm.cache import CometCache
from cometlm.config import CometConfig
from cometlm.device import return_freed_memory
from cometlm.grid import Cell, Grid, LayerState, walk_by_chunk
from cometlm.layout import ChunkLayout, Step, plan, take
from cometlm.memory import Comet, LayerMemoryWeights
from cometlm.model_config import CometModelConfig

_TABLES_KEPT = 4


class CometPreTrainedModel(PreTrainedModel):
    """What both models share with transformers."""

    config_class = CometModelConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False
    _supports_sdpa = True
    _no_split_modules = ["Cell"]  # noqa: RUF012 (transformers' own form)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the backbone comes trained and `Comet` initialises itself."""

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the backbone has tied what it ties, whatever its config says."""


class CometModel(CometPreTrainedModel):
    """Reads text of any length and returns the last hidden state of every text token."""

    def __init__(self, config: CometModelConfig, parts: Parts) -> None:
        super().__init__(config)
        sizes = config.comet_config
        self.embed_tokens = parts.embed_tokens
        self.cells = nn.ModuleList([Cell(layer, parts.family) for layer in parts.layers])
        self.norm = parts.norm
        self.rotary_emb = parts.rotary
        self.comet = _new_comet(parts, sizes)
        self._family = parts.family
        self._tables: dict[tuple[Any, ...], list[RotaryTable]] = {}
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's embedding."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the backbone's embedding."""
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: CometCache | None = None,
        use_cache: bool | None = None,
        stride: int | None = None,
        capacity: int | None = None,
        more_text: bool = False,
        hidden_to_keep: int = 0,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Read text, folding every full chunk into memory.

        Args:
            input_ids: [B, N] text tokens; any N.
            attention_mask: [B, N], or longer with the past in front; each row's ones must be
                contiguous, padding may stand left or right.
            past_key_values: what an earlier call returned; left as it was.
            use_cache: return a cache. Default: the config's, but not while training.
            stride: compression stride of this call. Default: the config's.
            capacity: temporary memory slots from the next fold on. Default: the config's.
            more_text: more text follows, so a chunk that ends full is closed in the same step.
            hidden_to_keep: how many last hidden states are wanted; 0 is all. A long prompt of
                which only the end counts then holds no more than a chunk.

        Returns:
            `last_hidden_state` [B, N or fewer, D] aligned with (the end of) `input_ids`, and
            `past_key_values`.

        Raises:
            ValueError: no tokens, ids outside the vocabulary, a mask with holes, a cache of
                another batch, a budget that exceeds the backbone's positions.
            FloatingPointError: a memory is not finite; names layer and chunk.
        """
        _refuse_unknown(kwargs)
        text = TextBatch.of(input_ids, attention_mask, self.config.vocab_size)
        cache = self.cache_for(past_key_values, text.batch)
        sizes = self._sizes(stride, capacity)
        reach = self._reach(cache, sizes)
        steps = plan(cache.rows, text.lengths, sizes.chunk_size, more_text)
        first = max(0, text.width - hidden_to_keep) if hidden_to_keep else 0
        hidden, cache = self._walk(text, cache, steps, sizes, reach, first)
        if use_cache is None:
            use_cache = bool(getattr(self.config, "use_cache", True)) and not self.training
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=cast("Any", cache) if use_cache else None,
        )

    def empty_cache(self, batch: int = 1) -> CometCache:
        """The cache before any text."""
        return CometCache.empty(len(self.cells), batch, self.config.comet_config)

    def cache_for(self, given: CometCache | None, batch: int) -> CometCache:
        """The cache given, or an empty one if there is none.

        Raises:
            ValueError: it is not a `CometCache`, or of another batch size or number of layers.
        """
        if given is None:
            return self.empty_cache(batch)
        if not isinstance(given, CometCache):
            raise ValueError(
                f"past_key_values must be a CometCache that this model returned, got "
                f"{type(given).__name__}"
            )
        if len(given.rows) != batch or len(given.layers) != len(self.cells):
            raise ValueError(
                f"past_key_values holds {len(given.rows)} rows and {len(given.layers)} layers, "
                f"but input_ids has {batch} rows and the model {len(self.cells)} layers"
            )
        return given

    # --- one call ---------------------------------------------------------------------------

    def _sizes(self, stride: int | None, capacity: int | None) -> CometConfig:
        sizes = self.config.comet_config
        if stride is None and capacity is None:
            return sizes
        sizes = sizes.replace(
            stride=sizes.stride if stride is None else stride,
            capacity=sizes.capacity if capacity is None else capacity,
        )
        sizes.check_positions(position_limit(self.config.text_config))
        return sizes

    def _reach(self, cache: CometCache, sizes: CometConfig) -> int:
        reach = cache.reach_under(sizes)
        limit = position_limit(self.config.text_config)
        if limit is not None and reach > limit:
            raise ValueError(
                f"stride={sizes.stride} and capacity={sizes.capacity} on top of what the cache "
                f"holds make rows of {reach} positions, but the backbone has "
                f"max_position_embeddings={limit}"
            )
        return reach

    def _walk(
        self,
        text: TextBatch,
        cache: CometCache,
        steps: list[Step],
        sizes: CometConfig,
        reach: int,
        first: int,
    ) -> tuple[Tensor, CometCache]:
        """Hidden states of the columns from `first` on, and the cache after all steps."""
        latest: list[ChunkLayout] = []

        def chunks() -> Iterator[tuple[Tensor, ChunkLayout]]:
            rows = cache.rows
            for step in steps:
                layout = ChunkLayout(sizes, rows, step, reach, text.ids.device)
                rows = layout.counts_after()
                latest[:] = [layout]
                yield self._embed(text, layout), layout

        states: tuple[LayerState, ...] = cache.layers
        wanted: list[tuple[Step, Tensor]] = []
        for out, states in walk_by_chunk(self._grid(reach), chunks(), cache.layers):
            (layout,) = latest
            if text.reaches(layout.step, first) or layout.step is steps[-1]:
                index = layout.text_index.to(out.device)
                wanted.append((layout.step, self.norm(take(out, index))))
            if layout.closes:
                _check_finite(states, layout)
                return_freed_memory(out.device)
        rows = latest[0].counts_after()
        columns = cache.columns + text.width
        return text.aligned(wanted, first), CometCache(states, rows, sizes, reach, columns)

    def _embed(self, text: TextBatch, layout: ChunkLayout) -> Tensor:
        """Items [B, I, D] of one step: text, compression and readout tokens in their order."""
        embedded: Tensor = self.embed_tokens(text.piece(layout))
        if not (any(layout.compressions) or layout.closes):
            return embedded
        like = embedded[:1, :1] if embedded.shape[1] else embedded.new_zeros(1, 1, self._width)
        batch = embedded.shape[0]
        parts = [embedded]
        for added in (self.comet.compression, self.comet.readout):
            rows = torch.zeros_like(like[0]) if added is None else added.to(like)
            parts.append(rows[None].expand(batch, -1, -1))
        return take(torch.cat(parts, dim=1), layout.order)

    @property
    def _width(self) -> int:
        return int(self.config.hidden_size)

    def _grid(self, reach: int) -> Grid:
        return Grid(
            cells=cast("Sequence[Cell]", self.cells),
            weights=cast("Sequence[LayerMemoryWeights]", self.comet.layers),
            rotary=self._rotary(reach),
        )

    def _rotary(self, reach: int) -> list[RotaryTable]:
        """Each layer's rotary table on the layer's device; derived, so kept between calls."""
        weight: Tensor = self.norm.weight  # type: ignore[assignment]
        like = torch.empty(0, dtype=weight.dtype, device=device_of(self.embed_tokens))
        devices = [device_of(cell) for cell in self.cells]
        key = (reach, like.dtype, *devices)
        if key not in self._tables:
            config = self.config.text_config
            by_type = self._family.rotary_by_layer_type
            tables = rotary_tables(self.rotary_emb, config, by_type, reach, like)
            placed: dict[Any, RotaryTable] = {}
            for i, device in enumerate(devices):
                kind = layer_type(config, i)
                if (kind, device) not in placed:
                    cos, sin = tables[kind]
                    placed[kind, device] = (cos.to(device), sin.to(device))
            while len(self._tables) >= _TABLES_KEPT:
                self._tables.pop(next(iter(self._tables)))
            self._tables[key] = [
                placed[layer_type(config, i), device] for i, device in enumerate(devices)
            ]
        return self._tables[key]


def position_limit(config: Any) -> int | None:
    """Positions that a backbone was made for, or None if its config does not say."""
    limit = getattr(config, "max_position_embeddings", None)
    return int(limit) if limit else None


def _check_finite(states: Sequence[LayerState], layout: ChunkLayout) -> None:
    """Stop at the first layer whose memory is not finite; looks at what this chunk wrote."""
    checks: list[Tensor] = []
    for state in states:
        written = (state.memory.state, *state.memory.entries[-1:])
        # A sum is not finite where a term is not: one pass, nothing of the memory's size is made.
        checks.extend(x.detach().sum(dtype=torch.float32) for x in written if x is not None)
    if not checks:
        return
    per_layer = len(checks) // len(states)
    sums = torch.stack([check.to(checks[0].device) for check in checks])  # one wait for the device
    for i, total in enumerate(sums.tolist()):
        if not math.isfinite(total):
            raise FloatingPointError(
                f"the memory of layer {i // per_layer} is not finite (NaN or infinite) after chunk "
                f"{max(row.folds for row in layout.rows)}; the cache given to this call is unharmed"
            )


def _new_comet(parts: Parts, sizes: CometConfig) -> Comet:
    """Fresh memory weights, each where its layer lives, in the backbone's dtype."""
    weight: Tensor = parts.norm.weight  # type: ignore[assignment]
    comet = Comet(parts.config.hidden_size, len(parts.layers), sizes)
    home = device_of(parts.embed_tokens)
    sample = torch.arange(min(4096, parts.config.vocab_size), device=home)
    with torch.no_grad():
        comet.imitate(parts.embed_tokens(sample).to("cpu", torch.float32))
    comet.to(home, weight.dtype)
    for weights, layer in zip(comet.layers, parts.layers, strict=True):
        weights.to(device_of(layer))
    return comet


def _refuse_unknown(kwargs: dict[str, Any]) -> None:
    """Refuse what would be ignored; `return_dict` is what callers in transformers always pass."""
    for name, value in kwargs.items():
        if name != "return_dict" and value is not None and value is not False:
            shown = f"{name}={value!r}" if isinstance(value, (bool, int, float, str)) else name
            raise ValueError(f"forward() does not take {shown}")
