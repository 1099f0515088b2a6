"""Watching a backbone read a few tokens: what its modules and its attention were called with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from cometlm.backbones.calling import Capture, told
from cometlm.backbones.plain_attention import plain_attention
from cometlm.backbones.text_half import attending_by, text_config

NAME = "cometlm-watching"
_IDS = (7, 5, 9, 6)  # different ones that are no positions of theirs


class UnsupportedBackboneError(ValueError):
    """A backbone cannot be given a memory; says which layer and why."""


@dataclass(frozen=True)
class Sample:
    """A few tokens, and what the backbone itself makes of them.

    Attributes:
        ids: [1, n].
        logits: [1, n, V].
        outputs: of each layer, [1, n, D].
        scaled: its logits are not what its head gives, but scaled or capped.
    """

    ids: Tensor
    logits: Tensor
    outputs: list[Tensor]
    scaled: bool = True


@dataclass
class Called:
    """One call of a module."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    out: Any

    @cached_property
    def given(self) -> dict[str, Any]:
        """The arguments by name, in the order of the signature."""
        bound = inspect.signature(self.module.forward).bind(*self.args, **self.kwargs)
        given: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            if bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                given |= value
            else:
                given[name] = value
        return given

    @property
    def entered(self) -> Any:
        """The first argument: of a layer, its hidden states."""
        return next(iter(self.given.values()), None)

    @property
    def left(self) -> Any:
        """The first result: of a layer, its hidden states."""
        return first(self.out)


@dataclass
class Attended:
    """One call of the attention function."""

    module: nn.Module
    key: Tensor
    mask: Tensor | None
    options: Mapping[str, Any]


@dataclass
class Mask:
    """A mask that was made for some layers.

    Attributes:
        made: bool, True where something is seen.
        local_size: of a window or a block; None where all that came before is seen.
        sees: (batch, head, query, key) → whether it is seen.
    """

    made: Tensor
    local_size: int | None
    sees: Callable[..., Any]


@dataclass
class Record:
    """What was seen while a backbone read.

    Attributes:
        layers: calls of layers, in order.
        others: calls of modules outside of layers.
        attended: calls of the attention function.
        masks: all that were made.
    """

    layers: list[Called] = field(default_factory=list)
    others: list[Called] = field(default_factory=list)
    attended: list[Attended] = field(default_factory=list)
    masks: list[Mask] = field(default_factory=list)


_RECORD: ContextVar[Record | None] = ContextVar("record", default=None)


def watch(backbone: PreTrainedModel, layers: Sequence[nn.Module]) -> tuple[Sample, Record]:
    """Let a backbone read a few tokens, and note what is called with what.

    It attends by plain attention, which does all that its layers ask for; some of transformers' own
    functions leave softcaps out.

    Args:
        layers: its layers.

    Raises:
        UnsupportedBackboneError: it cannot read them.
    """
    ids, record = _ids(backbone), Record()
    with _quiet(backbone), _recording(backbone, layers, record), attending_by(backbone, NAME):
        logits = _run(backbone, ids)
    scaled = not _is_the_heads(logits, backbone.get_output_embeddings(), record)
    return Sample(ids, logits, [called.left for called in record.layers], scaled), record


def _is_the_heads(logits: Tensor, head: nn.Module | None, record: Record) -> bool:
    """Whether logits are what the head made of what a module gave, neither of them scaled."""
    outs = [first(called.out) for called in record.others if called.module is not head]
    return any(
        torch.equal(first(called.out).to(logits), logits)
        and any(isinstance(out, Tensor) and torch.equal(called.args[0], out) for out in outs)
        for called in record.others
        if called.module is head and called.args
    )


def refusal(backbone: PreTrainedModel, why: str) -> UnsupportedBackboneError:
    """The error that says why a backbone cannot be given a memory."""
    kind: str = backbone.config.model_type
    return UnsupportedBackboneError(f"{kind} cannot be given a memory: {why}")


def first(out: Any) -> Any:
    """What a module returns first."""
    return out[0] if isinstance(out, (tuple, list)) else out


def _ids(backbone: PreTrainedModel) -> Tensor:
    ids = torch.tensor([_IDS]) % int(text_config(backbone).vocab_size)
    embedding = backbone.get_input_embeddings()
    weight = next((p for p in embedding.parameters()), None)
    offloaded = any(hasattr(module, "_hf_hook") for module in backbone.modules())
    if any(p.is_meta for p in backbone.parameters()) and not offloaded:
        raise refusal(backbone, "its weights are on the meta device; load them first")
    hook = getattr(embedding, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is None:
        device = "cpu" if weight is None or weight.is_meta else weight.device
    return ids.to(device)


def _run(backbone: PreTrainedModel, ids: Tensor) -> Tensor:
    try:
        out: Any = backbone(input_ids=ids, use_cache=False)
        logits: Tensor = out.logits
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise refusal(backbone, f"its own forward fails on a few tokens: {error}") from error
    return logits


@contextmanager
def _quiet(backbone: PreTrainedModel) -> Iterator[None]:
    """Run without dropout, gradients and checkpointing."""
    modes = {module: module.training for module in backbone.modules()}
    backbone.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _recording(
    backbone: PreTrainedModel, layers: Sequence[nn.Module], record: Record
) -> Iterator[None]:
    """Note every call of a layer, of a module outside of layers, and of the attention function."""
    inside = {id(part) for layer in layers for part in layer.modules()}
    own = {id(layer) for layer in layers}

    def note(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        kept = record.layers if id(module) in own else record.others
        kept.append(Called(module, args, kwargs, out))

    token = _RECORD.set(record)
    with ExitStack() as stack:
        for module in backbone.modules():
            if id(module) in own or id(module) not in inside:
                hook = module.register_forward_hook(note, with_kwargs=True)
                stack.callback(hook.remove)
        try:
            yield
        finally:
            _RECORD.reset(token)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    comet: Capture | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function registered with transformers under `NAME`."""
    comet = told() if comet is None else comet
    if isinstance(comet, Capture):
        comet.take(key, value)
    record = _RECORD.get()
    if record is not None:
        noted = {**options, "softcap": softcap, "s_aux": s_aux}
        record.attended.append(Attended(module, key, attention_mask, noted))
    row = (query, key, value, attention_mask)
    out = plain_attention(*row, scaling, softcap=softcap, sinks=s_aux)
    return out.transpose(1, 2).contiguous(), None


def _mask(*args: Any, **options: Any) -> Tensor | None:
    """The mask function registered with transformers under `NAME`: never leaves a mask out."""
    made: Tensor | None = sdpa_mask(*args, **{**options, "allow_is_causal_skip": False})
    record = _RECORD.get()
    if record is not None and made is not None:
        function = options.get("mask_function")
        assert function is not None
        record.masks.append(Mask(made, options.get("local_size"), function))
    return made


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
