"""The decoder with memory: text of any length in, last hidden states out, memory of one chunk.

A backbone is taken apart into cells, and the module `comet` stands beside them.

Footguns:
    - Positions of padding give zeros as hidden states, so their logits mean nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from cometlm.backbones.families import Parts, RotaryTable, device_of
from cometlm.backbones.rotary import RotaryTables
from cometlm.compat import CACHE, EitherName, takes_either_name
from cometlm.config import CometConfig, CometModelConfig
from cometlm.core.cache import CometCache
from cometlm.core.cell import Cell
from cometlm.core.compiling import compile_or_warn
from cometlm.core.fixed_cache import FixedCache
from cometlm.core.layout import ChunkLayout, check_cuts, plan, plan_cuts, take
from cometlm.core.memory import Comet, LayerMemoryWeights
from cometlm.core.plan import Aside, Call, Scored, Told, Watch
from cometlm.core.pretrained_model import CometPreTrainedModel
from cometlm.core.recompute import Recomputation, read_on, read_recomputed
from cometlm.core.state import States
from cometlm.core.text_batch import TextBatch, check_shape, documents
from cometlm.core.walk import Grid, through_layers


class Chunking(Protocol):
    """Says where the rows of a training batch are cut; see `train.chunk_plans`."""

    def draw(self, rows: Sequence[Sequence[int]], size: int) -> Any:
        """`cuts`, `stride` and `capacity` of a batch."""


class SharedReading(Protocol):
    """A way of reading a call together with other ranks."""

    def read(self, model: CometModel, call: Call) -> tuple[list[Tensor], States]:
        """What the steps leave that this rank has read, and the states after them."""


@dataclass
class CometOutput(EitherName, BaseModelOutputWithPast):
    """What `CometModel` returns; with `Scored`, `summed` in place of `last_hidden_state`.

    Attributes:
        summed: of the text.
        aside_summed: of all asides; `asides` is how often the aside was read.
    """

    summed: Tensor | None = None
    aside_summed: Tensor | None = None
    asides: int | None = None


class CometModel(CometPreTrainedModel):
    """Reads text of any length and returns the last hidden state of every text token.

    Attributes:
        recomputation: how a training step saves memory, or None to keep the whole graph; what
            `activation_checkpointing_enable()` sets.
        truncate_after: while training, gradients reach back at most this many chunks; 0 is all.
        chunking: where training samples are cut, unless a chunk is open; None cuts them as reading
            does.
        pipeline: reads each sample together with other ranks; see `parallel.pipeline`.
        memory_frozen: train without the memory's weights; otherwise that is an error.
    """

    def __init__(self, config: CometModelConfig, parts: Parts) -> None:
        super().__init__(config)
        sizes = config.comet_config
        self.embed_tokens = parts.embed_tokens
        self.cells = nn.ModuleList([Cell(layer, parts.family) for layer in parts.layers])
        self.norm = parts.norm
        self.rotary_emb = parts.rotary
        self.comet = _new_comet(parts, sizes)
        self._tables = RotaryTables(parts.rotary, config.text_config, parts.family)
        self.recomputation: Recomputation | None = None
        self.truncate_after = 0
        self.chunking: Chunking | None = None
        self.memory_frozen = False
        self.pipeline: SharedReading | None = None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's embedding."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the backbone's embedding."""
        self.embed_tokens = value

    @takes_either_name
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: CometCache | None = None,
        use_cache: bool | None = None,
        stride: int | None = None,
        capacity: int | None = None,
        more_text: bool = False,
        cuts: Sequence[Sequence[int]] | None = None,
        hidden_to_keep: int = 0,
        position_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        scored: Scored | None = None,
        aside: Aside | None = None,
        told: Told | None = None,
        **kwargs: Any,
    ) -> CometOutput:
        """Read text, folding every full chunk into memory.

        Args:
            input_ids: [B, N] text tokens; any N. They may be on the CPU wherever the model is.
            attention_mask: [B, N], or longer with the past in front; each row's ones must be
                contiguous, padding may stand left or right.
            past_key_values: what an earlier call returned; left as it was. `cache` is another name.
            use_cache: return a cache. Default: the config's, but not while training.
            stride: compression stride of this call. Default: the config's.
            capacity: temporary memory slots from the next fold on. Default: the config's.
            more_text: more text follows, so a chunk that ends full is closed in the same step; with
                `cuts` the last chunk is closed, however short it is.
            cuts: text tokens of each row's chunks, in order, instead of full ones and a rest
                (SPEC §5). Only where the past has no open chunk.
            hidden_to_keep: how many last hidden states are wanted; 0 is all. A long prompt of
                which only the end counts then holds no more than a chunk.
            position_ids: [1, N] where one row holds several documents: they start again at 0 with
                each, and so does the memory. With an `attention_mask` they are not looked at.
            cu_seq_lens_q: [documents + 1] where those documents begin and the last one ends.
            scored: reduce each chunk's hidden states at once instead of returning them all.
            aside: with `scored`: also read and score this from forks of the memory.
            told: with `scored`: also score what readout tokens say.

        Returns:
            `last_hidden_state` [B, N or fewer, D] aligned with (the end of) `input_ids`, or
            `summed`; and `past_key_values`.

        Raises:
            ValueError: no tokens, ids outside the vocabulary, a mask with holes, cuts that are not
                of these rows, a cache of another batch, a budget that exceeds the backbone's
                positions, positions that are not those of packed documents, training with a
                frozen memory.
            FloatingPointError: a memory is not finite; names layer and chunk.
        """
        _refuse_unknown(kwargs)
        check_shape(input_ids)
        if self._learning:
            self._check_trainable()
        if attention_mask is not None:
            position_ids = None
        if position_ids is not None or cu_seq_lens_q is not None:
            _refuse_past(past_key_values)
            if aside is not None or told is not None:
                raise ValueError(
                    "forward() takes no aside, and nothing told, with packed documents"
                )
            found = documents(position_ids, cu_seq_lens_q, input_ids)
            if len(found) > 1:
                return self._read_packed(input_ids, found, stride, capacity, scored)
        home = device_of(self.embed_tokens)
        text = TextBatch.of(input_ids, attention_mask, self.config.vocab_size, home)
        cache = self.cache_for(past_key_values, text.batch)
        if cuts is not None:
            check_cuts(cuts, text.lengths, cache.rows, self.config.comet_config.chunk_size)
        elif self._learning and self.chunking is not None and not cache.is_open:
            drawn = self.chunking.draw(text.rows(), self.config.comet_config.chunk_size)
            cuts, stride, capacity = drawn.cuts, drawn.stride or stride, drawn.capacity or capacity
        sizes = self.sizes_of_call(stride, capacity)
        if aside is not None:
            aside.check(text.batch, sizes.chunk_size)
        if told is not None:
            told.check(text.batch, sizes.global_slots)
        if use_cache is None:
            use_cache = bool(getattr(self.config, "use_cache", True)) and not self.training
        call = Call(
            text=text,
            cache=cache,
            steps=plan_cuts(cuts, more_text)
            if cuts
            else plan(cache.rows, text.lengths, sizes.chunk_size, more_text),
            sizes=sizes,
            reach=self._reach(cache, sizes),
            first=max(0, text.width - hidden_to_keep) if hidden_to_keep else 0,
            use_cache=use_cache,
            scored=scored,
            aside=aside,
            told=told,
            aside_text=aside and TextBatch.of(aside.ids, None, self.config.vocab_size, home),
        )
        kept, after = self._walk(call)
        past = cast("Any", after if use_cache else None)
        if scored is not None:
            return _summed(kept, call.asides, past)
        wanted = [
            (step, out) for step, out in zip(call.steps, kept, strict=True) if call.wants(step)
        ]
        hidden = text.aligned(wanted, call.first)
        return CometOutput(last_hidden_state=hidden, **{CACHE: past})

    def _read_packed(
        self,
        ids: Tensor,
        found: Sequence[slice],
        stride: int | None,
        capacity: int | None,
        scored: Scored | None,
    ) -> CometOutput:
        """Each document of a packed row on its own, with a memory of its own."""
        outs = []
        for part in found:
            own = scored and scored._replace(labels=scored.labels[:, part])
            out = self.forward(
                ids[:, part], use_cache=False, stride=stride, capacity=capacity, scored=own
            )
            outs.append(out)
        if scored is not None:
            summed = torch.stack([out.summed for out in outs if out.summed is not None]).sum(0)
            return CometOutput(summed=summed)
        hidden = [out.last_hidden_state for out in outs if out.last_hidden_state is not None]
        return CometOutput(last_hidden_state=torch.cat(hidden, dim=1))

    @property
    def _learning(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def _check_trainable(self) -> None:
        """Refuse to train round a memory that somebody froze without meaning to."""
        if self.memory_frozen or any(p.requires_grad for p in self.comet.parameters()):
            return
        if any(p.requires_grad for p in self.parameters()):
            raise ValueError(
                "the memory is frozen but other weights are trained, so it would stay as untrained "
                "as it is: use cometlm.lora_config(), which trains it beside LoRA, or say that it "
                "is meant with model.model.memory_frozen = True"
            )

    def compile_cells(self, **options: Any) -> bool:
        """Put every cell through `torch.compile`, and try it on two chunks.

        Where that fails, it says so in a warning and the cells stay as they were.

        Args:
            options: of `torch.compile`.

        Returns:
            Whether the cells are compiled now.
        """
        return compile_or_warn(cast("Sequence[nn.Module]", self.cells), self._try, **options)

    def _try(self) -> None:
        """Read two chunks, and backward where weights are trained."""
        size = self.config.comet_config.chunk_size
        ids = torch.zeros(1, size + 1, dtype=torch.long, device=device_of(self.embed_tokens))
        hidden = self.forward(ids, use_cache=False).last_hidden_state
        assert hidden is not None
        if hidden.requires_grad:
            wanted = [p for p in self.parameters() if p.requires_grad]
            torch.autograd.grad(hidden.sum(), wanted, allow_unused=True)

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
        if isinstance(given, FixedCache):
            given = given.value()
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

    def sizes_of_call(self, stride: int | None, capacity: int | None) -> CometConfig:
        """The sizes that a call reads with: the config's, where it names no others.

        Raises:
            ValueError: they exceed the backbone's positions.
        """
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

    def _walk(self, call: Call) -> tuple[list[Tensor], CometCache]:
        """What each step leaves, in order, and the cache after all of them."""
        columns = call.cache.columns + call.text.width
        if self.pipeline is not None:
            kept, after = self.pipeline.read(self, call)
            return kept, CometCache(after, call.rows, call.sizes, call.reach, columns)
        grid, scored = self.grid(call.reach), call.scored

        def read(layout: ChunkLayout, states: States) -> tuple[Tensor, States]:
            out, after = through_layers(grid, self.embedded(call, layout), layout, states)
            if call.is_aside(layout):
                after = states
            elif layout.step is call.steps[-1] and not call.use_cache and call.aside is None:
                after = ()  # nobody looks at it
            elif scored is None and not call.wants(layout.step):
                return out.new_zeros(()), after
            return self.scored(call, layout, out), after

        layouts = call.layouts()
        states: States = call.cache.layers
        args = (read, layouts, states)
        cut = self.truncate_after if self._learning else 0
        watch = Watch(give_back=not self._learning)
        if self._learning and self.recomputation is not None:
            own = [*self.parameters(), *(scored.parameters if scored else ())]
            wanted = list(dict.fromkeys(p for p in own if p.requires_grad))
            kept, states = read_recomputed(*args, wanted, self.recomputation, watch, cut)
        else:
            kept, states = read_on(*args, watch, cut)
        watch.end()
        return kept, CometCache(states, call.rows, call.sizes, call.reach, columns)

    def embedded(self, call: Call, layout: ChunkLayout) -> Tensor:
        """Items [B, I, D] of one step: text, compression and readout tokens in their order."""
        text, _ = call.text_of(layout)
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

    def scored(self, call: Call, layout: ChunkLayout, out: Tensor) -> Tensor:
        """The last layer's outputs [B, I, D] of a step as what is wanted: text, or its score."""
        hidden: Tensor = self.norm(take(out, layout.text_index.to(out.device)))
        text, labels = call.text_of(layout)
        if call.scored is None or labels is None:
            return hidden
        score = call.scored.score(hidden, text.labels(labels, layout))
        if call.told is None or call.is_aside(layout):
            return score
        wanted = call.told.of(layout).to(score.device)
        count = (wanted != -100).sum().to(score.dtype)
        loss = score.new_zeros(())
        if count:
            said: Tensor = self.norm(take(out, layout.readout_index.to(out.device)))
            loss = call.scored.score(said, wanted)[0]
        return torch.cat([score, torch.stack([loss, count])])

    @property
    def _width(self) -> int:
        return int(self.config.hidden_size)

    def grid(self, reach: int) -> Grid:
        """The layers, with rotary tables for rows of `reach` items."""
        return Grid(
            cells=cast("Sequence[Cell]", self.cells),
            weights=cast("Sequence[LayerMemoryWeights]", self.comet.layers),
            rotary=self._rotary(reach),
        )

    def _rotary(self, reach: int) -> list[RotaryTable]:
        """Each layer's rotary table."""
        weight: Tensor = self.norm.weight  # type: ignore[assignment]
        like = torch.empty(0, dtype=weight.dtype, device=device_of(self.embed_tokens))
        return self._tables.of(reach, like, [device_of(cell) for cell in self.cells])


def position_limit(config: Any) -> int | None:
    """Positions that a backbone was made for, or None if its config does not say."""
    limit = getattr(config, "max_position_embeddings", None)
    return int(limit) if limit else None


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


def _refuse_past(past: CometCache | None) -> None:
    if past is not None:
        raise ValueError(
            "forward() does not take position_ids or cu_seq_lens_q with past_key_values: packed "
            "documents begin with an empty memory"
        )


def _summed(kept: Sequence[Tensor], asides: Sequence[bool], past: Any) -> CometOutput:
    """Scores of the text's steps and of the asides among them, each summed."""
    parts: dict[bool, list[Tensor]] = {False: [], True: []}
    for score, is_aside in zip(kept, asides, strict=True):
        parts[is_aside].append(score)
    summed, beside = (torch.stack(part).sum(0) if part else None for part in parts.values())
    return CometOutput(summed=summed, aside_summed=beside, asides=len(parts[True]), **{CACHE: past})


# What callers pass along that says nothing new: `return_dict` is transformers' habit, the others
# describe packed documents to kernels that are not used here.
_SAID_ELSEWHERE = ("return_dict", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def _refuse_unknown(kwargs: dict[str, Any]) -> None:
    """Refuse what would be ignored."""
    for name, value in kwargs.items():
        if name not in _SAID_ELSEWHERE and value is not None and value is not False:
            shown = f"{name}={value!r}" if isinstance(value, (bool, int, float, str)) else name
            raise ValueError(f"forward() does not take {shown}")
