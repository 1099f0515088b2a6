"""The decoder with memory: text of any length in, last hidden states out, memory of one chunk.

A backbone is taken apart into cells, and the module `comet` stands beside them.

Pitfalls:
    - Positions of padding give zeros as hidden states, so their logits mean nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn, Unpack, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import can_return_tuple

from cometlm.backbones.calling import RotaryTable
from cometlm.backbones.families import device_of
from cometlm.backbones.parts import Parts, rows_of
from cometlm.backbones.rotary import RotaryTables
from cometlm.compat import CACHE, EitherName, takes_either_name
from cometlm.config import CometConfig, CometModelConfig, position_field, position_limit
from cometlm.core.cache import CometCache
from cometlm.core.cell import Cell
from cometlm.core.compiling import compile_or_warn
from cometlm.core.fixed_cache import FixedCache
from cometlm.core.fixed_layout import FixedLayout
from cometlm.core.layout import ChunkLayout, Piece, RowCounts, Step, take
from cometlm.core.memory import Comet, LayerMemoryWeights
from cometlm.core.observer import ClosedChunk, Score, as_vector, from_vector
from cometlm.core.packed_products import PackedProducts
from cometlm.core.plan import (
    Budget,
    Call,
    ReadOptions,
    Scored,
    check_chunk_lengths,
    plan_chunks,
    plan_full_chunks,
)
from cometlm.core.pretrained_model import CometPreTrainedModel
from cometlm.core.recompute import Recomputation, read_on, read_recomputed
from cometlm.core.recorded_chunks import RecordedChunks
from cometlm.core.refusals import refuse_flags, refuse_of_packed, refuse_past, refuse_unknown
from cometlm.core.state import States, map_tensors
from cometlm.core.text_batch import TextBatch, check_shape, documents, next_labels
from cometlm.core.training_plan import TrainingPlan
from cometlm.core.walk import Grid, through_layers
from cometlm.core.watch import Watch


@dataclass
class CometOutput(EitherName, BaseModelOutputWithPast):
    """What `CometModel` returns; with `Scored`, `summed` in place of `last_hidden_state`.

    Attributes:
        summed: [summed loss, labels that were the likeliest token] of the text.
        observed: what an observer of the training plan added, by name.
    """

    summed: Tensor | None = None
    observed: dict[str, Score] | None = None


class CometModel(CometPreTrainedModel):
    """Reads text of any length and returns the last hidden state of every text token.

    Attributes:
        training_plan: how it reads while it is trained.
    """

    def __init__(self, config: CometModelConfig, parts: Parts) -> None:
        super().__init__(config)
        sizes = config.comet_config
        self.embed_tokens = parts.embed_tokens
        self.cells = nn.ModuleList(
            [Cell(layer, call, parts.family) for layer, call in zip(*parts.called, strict=True)]
        )
        self.norm = parts.norm
        for name, module in parts.rotary_modules.items():
            self.add_module(name, module)
        self._scale, self._first_place = parts.scale, 0
        self.embed_norm, self.embed_positions = parts.embed_norm, None
        if parts.positions is not None:
            self._first_place = parts.positions.offset
            self.embed_positions = parts.positions.module
        self.comet = _new_comet(parts, sizes)
        self._tables = RotaryTables(parts.rotations)
        self.training_plan = TrainingPlan()
        self._recorded: RecordedChunks | None = None
        self.packed: PackedProducts | None = None
        # Kept, since every learning forward asks them: the backbone's own switch may be turned.
        self._may_checkpoint = [m for m in self.cells.modules() if hasattr(m, _CHECKPOINTS)]
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's embedding."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the backbone's embedding."""
        self.embed_tokens = value

    def take_over_checkpointing(self) -> None:
        """Recompute chunks where layers were told to checkpoint themselves.

        They cannot: a layer that runs again would add its keys to the chunk again.
        """
        told = [module for module in self._may_checkpoint if getattr(module, _CHECKPOINTS)]
        for module in told:
            setattr(module, _CHECKPOINTS, False)
        if told and self.training_plan.recomputation is None:
            self.training_plan = replace(self.training_plan, recomputation=Recomputation())

    @can_return_tuple
    @takes_either_name
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: CometCache | None = None,
        use_cache: bool | None = None,
        chunk_size: int | None = None,
        stride: int | None = None,
        capacity: int | None = None,
        scored: Scored | None = None,
        **options: Unpack[ReadOptions],
    ) -> CometOutput:
        """Read text, folding every full chunk into memory.

        Args:
            input_ids: [B, N] text tokens; any N. They may be on the CPU wherever the model is.
            attention_mask: [B, N], or longer with the past in front; each row's ones must be
                contiguous, padding may stand left or right.
            past_key_values: what an earlier call returned; left as it was. `cache` is another name.
            use_cache: return a cache. Default: the config's; while training none with a loss alone
                or where chunks are recomputed.
            chunk_size: text tokens per chunk in this call. Default: the config's. It must not be
                less than what an open chunk holds.
            stride: compression stride of this call. Default: the config's.
            capacity: temporary memory slots from the next fold on. Default: the config's.
            scored: reduce each chunk's hidden states at once instead of returning them all.
            options: see `ReadOptions`.

        Returns:
            `last_hidden_state` [B, N or fewer, D] aligned with (the end of) `input_ids`, or
            `summed`; and `past_key_values`.

        Raises:
            ValueError: no tokens, ids outside the vocabulary, a mask with holes, chunk lengths that
                are not of these rows, a cache of another batch, a budget that exceeds the
                backbone's positions, positions that are not those of packed documents, training
                with a frozen memory, an unknown option.
            FloatingPointError: a memory is not finite; names layer and chunk.
        """
        input_ids = check_shape(input_ids)
        if self.packed is not None and input_ids.shape[1] > 1:
            self.packed.check()
        refuse_unknown(options)
        refuse_flags(self.config, self._learning)
        if self._learning:
            self._check_trainable()
            self.take_over_checkpointing()
        budget: Budget = {"chunk_size": chunk_size, "stride": stride, "capacity": capacity}
        position_ids = options.get("position_ids") if attention_mask is None else None
        borders = options.get("cu_seq_lens_q")
        if position_ids is not None or borders is not None:
            refuse_past(past_key_values)
            found = documents(position_ids, borders, input_ids)
            if len(found) > 1:
                refuse_of_packed(options)
                if self._learning and self.training_plan.observer is not None:
                    raise ValueError("an observer takes no packed documents: give it rows")
                return self._read_packed(input_ids, found, budget, scored)
        home = device_of(self.embed_tokens)
        text = TextBatch.of(input_ids, attention_mask, self.config.vocab_size, home)
        cache = self.cache_for(past_key_values, text.batch)
        if use_cache is None:
            # A loss alone is not gone on from, nor, in transformers, what is computed again.
            no_cache = scored is not None or self.training_plan.recomputation is not None
            use_cache = bool(self.config.use_cache) and not (self.training and no_cache)
        steps, sizes = self._steps(text, cache, budget, options)
        keep = options.get("hidden_to_keep", 0)
        observer = self.training_plan.observer if self._learning and scored else None
        call = Call(
            text=text,
            cache=cache,
            steps=steps,
            sizes=sizes,
            max_positions=self._max_positions(cache, sizes),
            first=max(0, text.width - keep) if keep else 0,
            use_cache=use_cache,
            scored=scored,
            observer=observer,
        )
        try:
            kept, after = self._walk(call)
        except NotImplementedError as error:
            self._check_memory_is_here(error)
            raise
        past = {CACHE: cast("Any", after if use_cache else None)}
        if scored is not None:
            total = torch.stack(kept).sum(0)
            observed = from_vector(total[2:], observer.losses) if observer else None
            return CometOutput(summed=total[:2], observed=observed, **past)
        wanted = [
            (step, out) for step, out in zip(call.steps, kept, strict=True) if call.wants(step)
        ]
        return CometOutput(last_hidden_state=text.aligned(wanted, call.first), **past)

    def _steps(
        self,
        text: TextBatch,
        cache: CometCache,
        budget: Budget,
        options: ReadOptions,
    ) -> tuple[list[Step], CometConfig]:
        """The steps of a call, and the sizes that it reads with."""
        lengths = options.get("chunk_lengths")
        sizes = self.sizes_of_call(**budget)
        chunking = self.training_plan.chunking if self._learning else None
        if lengths is not None:
            check_chunk_lengths(lengths, text.lengths, cache.rows, sizes.chunk_size)
        elif chunking is not None and not cache.is_open:
            drawn = chunking.draw(text.rows(), sizes.chunk_size)
            lengths = drawn.chunk_lengths
            sizes = self.sizes_of_call(
                sizes.chunk_size, drawn.stride or sizes.stride, drawn.capacity or sizes.capacity
            )
        close_last = options.get("close_last", False)
        if lengths is not None:
            return plan_chunks(lengths, close_last), sizes
        steps = plan_full_chunks(cache.rows, text.lengths, sizes.chunk_size, close_last)
        return steps, sizes

    def _read_packed(
        self,
        ids: Tensor,
        found: Sequence[slice],
        budget: Budget,
        scored: Scored | None,
    ) -> CometOutput:
        """Each document of a packed row on its own, with a memory of its own."""
        outs = []
        for part in found:
            own = scored and scored._replace(labels=scored.labels[:, part])
            outs.append(self.forward(ids[:, part], use_cache=False, **budget, scored=own))
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
        memory = list(self.comet.parameters())
        learns = any(p.requires_grad for p in memory)
        if not memory or learns or self.training_plan.memory_frozen:
            return
        if any(p.requires_grad for p in self.parameters()):
            raise ValueError(
                "the memory is frozen but other weights are trained, so it would stay as untrained "
                "as it is: use cometlm.lora_config(), which trains it beside LoRA, or say that it "
                "is meant with model.training_plan = TrainingPlan(memory_frozen=True)"
            )

    def _check_memory_is_here(self, error: Exception) -> None:
        """Say of an error whether it is that of a memory whose weights were put elsewhere."""
        away = next((name for name, p in self.comet.named_parameters() if p.is_meta), None)
        if away is not None:
            raise ValueError(
                f"the memory's weights cannot be offloaded, but comet.{away} has no data here: "
                "offload the backbone, then attach(), or place model.comet on a device"
            ) from error

    def compile_cells(self, **options: Any) -> bool:
        """Put every cell through `torch.compile`, and try it on two chunks.

        Where that fails, it says so in a warning and the cells stay as they were.

        Args:
            options: of `torch.compile`.

        Returns:
            Whether the cells are compiled now.
        """
        return compile_or_warn(cast("Sequence[nn.Module]", self.cells), self._try, **options)

    def record_chunks(self, on: bool = True) -> None:
        """Record reading a whole chunk with a full memory once, and replay it, where devices can.

        For reading long texts without gradients on an accelerator; on CPUs nothing changes. It
        holds one chunk's activations for good. Call it again where adapters are switched.

        Args:
            on: False forgets what was recorded, and records no more.
        """
        self._recorded = RecordedChunks() if on else None

    def _try(self) -> None:
        """Read two chunks, and backward where weights are trained."""
        size = self.config.comet_config.chunk_size
        ids = torch.zeros(1, size + 1, dtype=torch.long, device=device_of(self.embed_tokens))
        hidden = self.forward(ids, use_cache=False).last_hidden_state
        assert hidden is not None
        if hidden.requires_grad:
            wanted = [p for p in self.parameters() if p.requires_grad]
            torch.autograd.grad(hidden.sum(), wanted, allow_unused=True)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not possible: a checkpoint is of a whole `CometForCausalLM`.

        Raises:
            ValueError: always.
        """
        raise ValueError(_PART_OF_A_MODEL)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Not possible, as `save_pretrained`.

        Raises:
            ValueError: always.
        """
        raise ValueError(_PART_OF_A_MODEL)

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

    @property
    def layers_with_memory(self) -> list[int]:
        """Layers that attend, and so have a memory: all of most backbones."""
        return [i for i, cell in enumerate(self.cells) if cast("Cell", cell).attends]

    # --- one call ---------------------------------------------------------------------------

    def sizes_of_call(
        self,
        chunk_size: int | None = None,
        stride: int | None = None,
        capacity: int | None = None,
    ) -> CometConfig:
        """The sizes that a call reads with: the config's, where it names no others.

        Raises:
            ValueError: they exceed the backbone's positions.
        """
        sizes = self.config.comet_config
        given = {"chunk_size": chunk_size, "stride": stride, "capacity": capacity}
        changed = {name: value for name, value in given.items() if value is not None}
        if not changed:
            return sizes
        if isinstance(chunk_size, int) and 1 <= chunk_size <= sizes.overlap:
            changed["overlap"] = chunk_size - 1  # only sessions overlap, in their own chunks
        sizes = sizes.replace(**changed)
        backbone = self.config.backbone_config
        sizes.check_positions(position_limit(backbone), position_field(backbone))
        return sizes

    def _max_positions(self, cache: CometCache, sizes: CometConfig) -> int:
        longest = cache.max_positions_under(sizes)
        limit = position_limit(self.config.backbone_config)
        if limit is not None and longest > limit:
            raise ValueError(
                f"chunk_size={sizes.chunk_size}, stride={sizes.stride} and capacity="
                f"{sizes.capacity} on top of what the cache holds make rows of {longest} "
                f"positions, but the backbone has "
                f"{position_field(self.config.backbone_config)}={limit}"
            )
        return longest

    def _walk(self, call: Call) -> tuple[list[Tensor], CometCache]:
        """What each step leaves, in order, and the cache after all of them."""
        columns = call.cache.columns + call.text.width
        how = self.training_plan
        if how.pipeline is not None:
            kept, after = how.pipeline.read(self, call)
            return kept, CometCache(after, call.rows, call.sizes, call.max_positions, columns)
        grid, scored = self.grid(call.max_positions), call.scored

        def read(layout: ChunkLayout, states: States) -> tuple[Tensor, States]:
            out, after = self._read_step(grid, call, layout, states)
            if scored is None and not call.wants(layout.step):
                return out.new_zeros(()), after
            kept = self.kept(call, layout, out, after)
            if call.is_last(layout) and not call.use_cache:
                after = ()  # nobody looks at it
            return kept, after

        states: States = call.cache.layers
        args = (read, call.layouts(), states)
        truncate = how.truncate_after if self._learning else 0
        watch = Watch(give_back=not self._learning)
        if self._learning and how.recomputation is not None:
            own = [*self.parameters(), *(scored.parameters if scored else ())]
            wanted = list(dict.fromkeys(p for p in own if p.requires_grad))
            kept, states = read_recomputed(*args, wanted, how.recomputation, watch, truncate)
        else:
            kept, states = read_on(*args, watch, truncate)
        watch.end()
        return kept, CometCache(states, call.rows, call.sizes, call.max_positions, columns)

    def _read_step(
        self, grid: Grid, call: Call, layout: ChunkLayout, states: States
    ) -> tuple[Tensor, States]:
        """The last layer's outputs [B, I, D] of a step, and every layer's state after it."""
        recorded = self._recorded
        if recorded is None or torch.is_grad_enabled() or not recorded.takes(layout):
            return through_layers(grid, self.embedded(call.text, layout), layout, states)

        def work(ids: Tensor, states: States) -> tuple[Tensor, States]:
            width = ids.shape[1]
            text = TextBatch(ids, (0,) * len(ids), (width,) * len(ids))
            alike = replace(layout, step=(Piece(0, width, close=True),) * len(ids))
            return through_layers(grid, self.embedded(text, alike), alike, states)

        return recorded.read(layout, call.text.piece(layout), states, work, self.parameters())

    def embedded(self, text: TextBatch, layout: ChunkLayout) -> Tensor:
        """Items [B, I, D] of one step: text, compression and readout tokens in their order."""
        embedded = self.embedded_text(text.piece(layout))
        if not (any(layout.compressions) or layout.closes):
            return self.placed(embedded, layout)
        like = embedded[:1, :1] if embedded.shape[1] else embedded.new_zeros(1, 1, self._width)
        batch = embedded.shape[0]
        parts = [embedded]
        for added in (self.comet.compression, self.comet.readout):
            rows = torch.zeros_like(like[0]) if added is None else added.to(like)
            parts.append(rows[None].expand(batch, -1, -1))
        return self.placed(take(torch.cat(parts, dim=1), layout.order), layout)

    def embedded_text(self, ids: Tensor) -> Tensor:
        """Text tokens [B, n, D] as they enter, without their places."""
        embedded: Tensor = self.embed_tokens(ids)
        embedded = embedded if self._scale == 1 else embedded * self._scale
        return embedded if self.embed_norm is None else self.embed_norm(embedded)

    def placed(self, items: Tensor, layout: ChunkLayout | FixedLayout) -> Tensor:
        """Items [B, I, D] with learned positions, where the backbone has such."""
        if self.embed_positions is None:
            return items
        return items + rows_of(self.embed_positions, layout.positions + self._first_place)

    def kept(self, call: Call, layout: ChunkLayout, out: Tensor, after: States) -> Tensor:
        """The last layer's outputs [B, I, D] of a step as what is wanted: text, or its scores.

        Args:
            after: every layer's state after the step, for an observer.

        Returns:
            Hidden states [B, n, D]; or [2], and three numbers for each loss of an observer.
        """
        hidden = self.normed(out, layout.text_index)
        if call.scored is None:
            return hidden
        score = call.scored.score(hidden, call.text.labels(call.scored.labels, layout))
        if call.observer is None:
            return score
        found: Mapping[str, Score] = {}
        if layout.closes:
            chunk = self._closed(call, layout, hidden, out, after)
            found = call.observer.after_chunk(chunk)
        return torch.cat([score, as_vector(found, call.observer.losses, score)])

    def _closed(
        self, call: Call, layout: ChunkLayout, hidden: Tensor, out: Tensor, after: States
    ) -> ClosedChunk:
        """What an observer sees of a chunk."""
        assert call.scored is not None
        rows, score = layout.counts_after(), call.scored.score

        def scored(hidden: Tensor, labels: Tensor) -> Score:
            loss, correct = score(hidden, labels).unbind()
            return Score(loss, correct, (labels != -100).sum())

        def read(ids: Tensor, labels: Tensor) -> Score:
            fork = self._beside(call, rows, after, ids)
            return scored(fork, next_labels(labels, None))

        return ClosedChunk(
            layout=layout,
            rows=rows,
            is_last=call.is_last(layout),
            states=after,
            text=hidden,
            readout=self.normed(out, layout.readout_index),
            score=scored,
            read=read,
        )

    def _beside(
        self, call: Call, rows: tuple[RowCounts, ...], states: States, ids: Tensor
    ) -> Tensor:
        """Last hidden states [P·B, A, D] of ids [P·B, A] read from these states, which stay.

        Raises:
            ValueError: ids of another batch, or more than the open chunks have room for.
        """
        room = call.sizes.chunk_size - max(row.text for row in rows)
        if ids.dim() != 2 or len(ids) % len(rows) or not len(ids) or not 1 <= ids.shape[1] <= room:
            raise ValueError(
                f"ids of a probe must be [{len(rows)} or a multiple, 1 … {room}] (rows of the "
                f"batch, and what a chunk has room for), got shape {tuple(ids.shape)}"
            )
        times = len(ids) // len(rows)
        if times > 1:
            rows *= times
            states = map_tensors(states, lambda x: x.repeat(times, *[1] * (x.dim() - 1)))
        text = TextBatch.of(ids, None, self.config.vocab_size, device_of(self.embed_tokens))
        layout = call.layout(rows, (Piece(0, text.width, close=False),) * text.batch)
        embedded = self.embedded(text, layout)
        out, _ = through_layers(self.grid(call.max_positions), embedded, layout, states)
        return self.normed(out, layout.text_index)

    def normed(self, out: Tensor, index: Tensor) -> Tensor:
        """Last hidden states of some items."""
        hidden: Tensor = self.norm(take(out, index.to(out.device)))
        return hidden

    @property
    def _width(self) -> int:
        return int(self.config.hidden_size)

    def grid(self, max_positions: int) -> Grid:
        """The layers, with rotary tables for rows of so many items."""
        return Grid(
            cells=cast("Sequence[Cell]", self.cells),
            weights=cast("Sequence[LayerMemoryWeights]", self.comet.layers),
            rotary=self._rotary(max_positions),
        )

    def _rotary(self, max_positions: int) -> list[RotaryTable]:
        """Each layer's rotary table."""
        like = torch.empty(0, dtype=_dtype(self), device=device_of(self.embed_tokens))
        return self._tables.of(max_positions, like, [device_of(cell) for cell in self.cells])


_CHECKPOINTS = "gradient_checkpointing"  # transformers' switch, on each layer
_PART_OF_A_MODEL = (
    "a CometModel has no checkpoint of its own: save and load the CometForCausalLM that it is a "
    "part of"
)


def checkpointing(module: nn.Module) -> Iterator[nn.Module]:
    """Modules in a module that transformers was told to checkpoint."""
    return (part for part in module.modules() if getattr(part, _CHECKPOINTS, False))


def _new_comet(parts: Parts, sizes: CometConfig) -> Comet:
    """Fresh memory weights, each where its layer lives, in the backbone's dtype."""
    attends = [call.attention is not None for call in parts.calls]
    comet = Comet(parts.config.hidden_size, attends, sizes)
    home = device_of(parts.embed_tokens)
    if home.type != "meta":  # else there are no weights yet
        sample = torch.arange(min(4096, parts.config.vocab_size), device=home)
        with torch.no_grad():
            embedded = parts.embed_tokens(sample) * parts.scale
            if parts.embed_norm is not None:
                embedded = parts.embed_norm(embedded)
            comet.imitate(embedded.to("cpu", torch.float32))
    comet.to(home, _dtype(parts))
    for weights, layer in zip(comet.layers, parts.layers, strict=True):
        weights.to(device_of(layer))
    return comet


def _dtype(parts: Parts | CometModel) -> torch.dtype:
    """The dtype that a backbone computes in.

    It is its last norm's, or its embedding's if that has no weights; neither is ever quantised.
    """
    weights = (*parts.norm.parameters(), *parts.embed_tokens.parameters())
    return next(weight.dtype for weight in weights if weight.is_floating_point())
