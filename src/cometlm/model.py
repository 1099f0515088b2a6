"""A Hugging Face causal language model with memory: input of any length, memory of one chunk.

`attach` takes a backbone apart into cells and adds the module `comet`; `detach` gives the backbone
back. The backbone's modules are shared, never copied, so its weights, hooks and adapters stay its
own.

Footguns:
    - While attached, the backbone object still runs by itself (as plain sdpa), without memory.
    - With `past_key_values` the first token of a call is not a label: its logits were the last
      call's.
    - Positions of padding give zeros as hidden states, so their logits mean nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from cometlm import attention
from cometlm.backbone import (
    Parts,
    RotaryTable,
    device_of,
    layer_type,
    rotary_tables,
    take_apart,
)
from cometlm.cache import CometCache
from cometlm.config import CometConfig
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

        Returns:
            `last_hidden_state` [B, N, D] aligned with `input_ids`, and `past_key_values`.

        Raises:
            ValueError: no tokens, ids outside the vocabulary, a mask with holes, a cache of
                another batch, a budget that exceeds the backbone's positions.
            FloatingPointError: a memory is not finite; names layer and chunk.
        """
        _refuse_unknown(kwargs)
        text = _Text.of(input_ids, attention_mask, self.config.vocab_size)
        cache = self._cache(past_key_values, text.batch)
        sizes = self._sizes(stride, capacity)
        reach = cache.reach_under(sizes)
        steps = plan(cache.rows, text.lengths, sizes.chunk_size, more_text)
        hidden, cache = self._walk(text, cache, steps, sizes, reach)
        if use_cache is None:
            use_cache = bool(getattr(self.config, "use_cache", True)) and not self.training
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=cast("Any", cache) if use_cache else None,
        )

    def empty_cache(self, batch: int = 1) -> CometCache:
        """The cache before any text."""
        return CometCache.empty(len(self.cells), batch, self.config.comet_config)

    # --- one call ---------------------------------------------------------------------------

    def _cache(self, given: CometCache | None, batch: int) -> CometCache:
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

    def _walk(
        self, text: _Text, cache: CometCache, steps: list[Step], sizes: CometConfig, reach: int
    ) -> tuple[Tensor, CometCache]:
        layouts: list[ChunkLayout] = []

        def chunks() -> Iterator[tuple[Tensor, ChunkLayout]]:
            rows = cache.rows
            for step in steps:
                layout = ChunkLayout(sizes, rows, step, reach, text.ids.device)
                rows = layout.counts_after()
                layouts.append(layout)
                yield self._embed(text, layout), layout

        states: tuple[LayerState, ...] = cache.layers
        outputs: list[Tensor] = []
        for out, states in walk_by_chunk(self._grid(reach), chunks(), cache.layers):
            layout = layouts[-1]
            index = layout.text_index.to(out.device)
            outputs.append(self.norm(take(out, index)))
            if layout.closes:
                _check_finite(states, layout)
        rows = layouts[-1].counts_after()
        hidden = text.aligned(outputs, steps)
        return hidden, CometCache(states, rows, sizes, reach)

    def _embed(self, text: _Text, layout: ChunkLayout) -> Tensor:
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


class CometForCausalLM(CometPreTrainedModel):
    """`CometModel` with the backbone's language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: CometModelConfig, backbone: PreTrainedModel) -> None:
        super().__init__(config)
        parts = take_apart(backbone)
        self.model = CometModel(config, parts)
        self.lm_head = parts.lm_head
        # Not registered as a submodule: its parts are, and detach() gives it back whole.
        object.__setattr__(self, "_backbone", backbone)
        object.__setattr__(self, "_undo", None)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's embedding."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """The backbone's head."""
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: CometCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Read text of any length; like any Hugging Face causal language model.

        Args:
            input_ids, attention_mask, past_key_values, use_cache: see `CometModel.forward`,
                which also takes `stride`, `capacity` and `more_text`.
            labels: [B, N]; each token's label is the next text token, across chunk borders. -100
                is not counted.
            logits_to_keep: how many last positions get logits, or which; 0 is all. Default: all,
                but none when there are labels, since the loss needs only one chunk's at a time.
            num_items_in_batch: divide the summed loss by this instead of by the labels counted.

        Returns:
            `loss` (a scalar), `logits` [B, kept, V] and `past_key_values`.

        Raises:
            ValueError, FloatingPointError: as `CometModel.forward`; also labels of another shape.
        """
        if self._undo is None:
            raise ValueError("this model was detached from its backbone; attach() again to use it")
        if labels is not None and labels.shape != input_ids.shape:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)} but input_ids {tuple(input_ids.shape)}; "
                "they must be the same"
            )
        out = self.model(input_ids, attention_mask, past_key_values, use_cache=use_cache, **kwargs)
        hidden = out.last_hidden_state
        loss = None
        if labels is not None:
            loss = self._loss(hidden, _next_labels(labels, attention_mask), num_items_in_batch)
        logits = None
        if logits_to_keep is None:
            logits_to_keep = 0 if labels is None else None
        if logits_to_keep is not None:
            logits = self.logits(_kept(hidden, logits_to_keep))
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [B, n, V] of last hidden states [B, n, D]."""
        logits: Tensor = self.lm_head(hidden)
        cap = getattr(self.config.text_config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _loss(self, hidden: Tensor, labels: Tensor, items: Tensor | int | None) -> Tensor:
        """Mean next-token loss, holding the logits of one chunk at a time."""
        size = self.config.comet_config.chunk_size

        def summed(part: Tensor, wanted: Tensor) -> Tensor:
            logits = self.logits(part)
            logits = logits if logits.dtype == torch.float64 else logits.float()
            return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum")

        labels = labels.to(hidden.device)
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        for part, wanted in zip(hidden.split(size, 1), labels.split(size, 1), strict=True):
            if torch.is_grad_enabled():
                total = total + cast(
                    "Tensor", checkpoint(summed, part, wanted, use_reentrant=False)
                )
            else:
                total = total + summed(part, wanted)
        if items is None:
            items = (labels != -100).sum().clamp(min=1)
        return total / items


def attach(
    backbone: PreTrainedModel, config: CometConfig | None = None, **sizes: Any
) -> CometForCausalLM:
    """Give a Hugging Face causal language model a memory. Undo with `detach`.

    Args:
        backbone: the model; its modules are shared with the result.
        config: sizes and switches; default the paper's.
        sizes: `CometConfig` fields to change, e.g. `chunk_size=512`.

    Raises:
        ValueError: a family that is not supported, an impossible size, sizes that exceed the
            backbone's positions, a backbone that already has a memory.
    """
    comet = (config or CometConfig()).replace(**_known(sizes))
    if getattr(backbone.config, "_attn_implementation", None) == attention.NAME:
        raise ValueError(f"{type(backbone).__name__} already has a memory; detach() it first")
    take_apart(backbone)
    comet.check_positions(position_limit(backbone.config))
    undo = _Undo.of(backbone)
    model_config = CometModelConfig(
        text_config=backbone.config,
        backbone=str(backbone.config.name_or_path or ""),
        comet=comet.to_dict(),
    )
    model = CometForCausalLM(model_config, backbone)
    undo.restore_implementations()  # a config resets those of the configs inside it
    backbone.config._attn_implementation = attention.NAME
    object.__setattr__(model, "_undo", undo)
    if hasattr(backbone, "hf_device_map"):
        model.hf_device_map = backbone.hf_device_map
    return model.train(backbone.training)


def detach(model: CometForCausalLM) -> PreTrainedModel:
    """Take the memory off and give back the backbone as it was before `attach`.

    Raises:
        ValueError: the model was detached before.
    """
    undo = cast("_Undo | None", model._undo)
    if undo is None:
        raise ValueError("this model is not attached to a backbone; it was detached before")
    undo()
    object.__setattr__(model, "_undo", None)
    return cast("PreTrainedModel", model._backbone)


def position_limit(config: Any) -> int | None:
    """Positions that a backbone was made for, or None if its config does not say."""
    limit = getattr(config, "max_position_embeddings", None)
    return int(limit) if limit else None


@dataclass(frozen=True)
class _Undo:
    """What `attach` changes on a backbone, as it was before."""

    backbone: PreTrainedModel
    attention: str | None
    experts: str | None
    requires_grad: dict[str, bool]

    @classmethod
    def of(cls, backbone: PreTrainedModel) -> _Undo:
        config = backbone.config
        flags = {name: p.requires_grad for name, p in backbone.named_parameters()}
        return cls(backbone, config._attn_implementation, config._experts_implementation, flags)

    def restore_implementations(self) -> None:
        self.backbone.config._attn_implementation = self.attention
        self.backbone.config._experts_implementation = self.experts

    def __call__(self) -> None:
        self.restore_implementations()
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(self.requires_grad.get(name, parameter.requires_grad))


@dataclass(frozen=True)
class _Text:
    """The text of one call: ids [B, N], and where each row's tokens begin and how many they are."""

    ids: Tensor
    starts: tuple[int, ...]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, ids: Tensor, mask: Tensor | None, vocabulary: int) -> _Text:
        if ids.dim() != 2 or ids.shape[0] == 0 or ids.shape[1] == 0:
            raise ValueError(
                f"input_ids must be [batch, tokens] with at least one of each, got shape "
                f"{tuple(ids.shape)}"
            )
        batch, width = ids.shape
        starts, lengths = (0,) * batch, (width,) * batch
        if mask is not None:
            if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < width:
                raise ValueError(
                    f"attention_mask must be [{batch}, {width}] like input_ids (or longer, with "
                    f"the past in front), got shape {tuple(mask.shape)}"
                )
            mask = mask[:, -width:].bool()
            starts, lengths = _runs(mask)
            ids = ids.masked_fill(~mask.to(ids.device), 0)
        low, high = (int(x) for x in torch.aminmax(ids))
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"input_ids must lie in 0 … {vocabulary - 1} (the vocabulary), got "
                f"{low if low < 0 else high}"
            )
        return cls(ids, starts, lengths)

    @property
    def batch(self) -> int:
        return self.ids.shape[0]

    @property
    def whole(self) -> bool:
        """Whether no row has padding."""
        return all(length == self.ids.shape[1] for length in self.lengths)

    def piece(self, layout: ChunkLayout) -> Tensor:
        """Ids [B, widest] of one step; filling where a row adds less than the widest."""
        width = layout.widest_text
        firsts = [s + piece.start for s, piece in zip(self.starts, layout.step, strict=True)]
        if len(set(firsts)) == 1:
            first = min(firsts[0], self.ids.shape[1] - width)
            if first == firsts[0]:
                return self.ids[:, first : first + width]
        index = torch.tensor(firsts)[:, None] + torch.arange(width)
        return self.ids.gather(1, index.clamp(max=self.ids.shape[1] - 1).to(self.ids.device))

    def aligned(self, outputs: list[Tensor], steps: list[Step]) -> Tensor:
        """Hidden states of all steps put where their ids stand, [B, N, D]; zeros at padding."""
        if self.whole and all(len({piece.text for piece in step}) == 1 for step in steps):
            return torch.cat(outputs, dim=1)
        values: list[Tensor] = []
        rows: list[int] = []
        columns: list[int] = []
        for out, step in zip(outputs, steps, strict=True):
            for b, piece in enumerate(step):
                first = self.starts[b] + piece.start
                values.append(out[b, : piece.text])
                rows.extend([b] * piece.text)
                columns.extend(range(first, first + piece.text))
        flat = torch.cat(values)
        where = (torch.tensor(rows, device=flat.device), torch.tensor(columns, device=flat.device))
        empty = flat.new_zeros(*self.ids.shape, flat.shape[-1])
        return empty.index_put(where, flat)


def _runs(mask: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Start and length of the one run of ones in each row of mask [B, N]."""
    rows = mask.cpu()
    lengths = rows.sum(1)
    starts = rows.int().argmax(1)
    if not lengths.any():
        raise ValueError("attention_mask has no ones: there is no text to read")
    column = torch.arange(rows.shape[1])
    run = (column >= starts[:, None]) & (column < (starts + lengths)[:, None])
    for b in (run != rows).any(1).nonzero().flatten().tolist():
        raise ValueError(
            f"attention_mask has a hole in row {b}: ones must be contiguous, with padding on the "
            "left or on the right"
        )
    return tuple(starts.tolist()), tuple(lengths.tolist())


def _next_labels(labels: Tensor, mask: Tensor | None) -> Tensor:
    """Labels [B, N] moved so that each position holds its next text token's, or -100."""
    if mask is not None:
        width = labels.shape[1]
        real = mask[:, -width:].bool().to(labels.device)
        follows = real.clone()
        follows[:, 1:] &= real[:, :-1]
        labels = labels.masked_fill(~follows, -100)
    return F.pad(labels[:, 1:], (0, 1), value=-100)


def _kept(hidden: Tensor, keep: int | Tensor) -> Tensor:
    if isinstance(keep, int):
        return hidden[:, -keep:] if keep else hidden
    return hidden[:, keep]


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


def _known(sizes: dict[str, Any]) -> dict[str, Any]:
    for name in sizes:
        if name not in CometConfig.__dataclass_fields__:
            fields = ", ".join(CometConfig.__dataclass_fields__)
            raise ValueError(f"unknown CometConfig field {name!r}; it has {fields}")
    return sizes


def _refuse_unknown(kwargs: dict[str, Any]) -> None:
    """Refuse what would be ignored; `return_dict` is what callers in transformers always pass."""
    for name, value in kwargs.items():
        if name != "return_dict" and value is not None and value is not False:
            raise ValueError(f"forward() does not take {name}={value!r}")
