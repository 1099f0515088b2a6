"""How a backbone without a row is put together, found by watching it read a few tokens.

Nothing is known of a model's code but what its run shows: which modules are its layers, what each
of them is called with, what stands between the embedding and the first layer, which norm and head
come last, and what each layer asks of transformers' attention interface. What cannot be taken over
is an error that names the layer and the reason. `core.backbone_check` then has the model with
memory read the same tokens, which must give the backbone's own logits.

Pitfalls:
    - The weights have to be there: nothing can be watched of a model on the meta device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cometlm.backbones.calling import LayerCall, RotaryTable
from cometlm.backbones.parts import LearnedPositions, Parts
from cometlm.backbones.recurrent_layers import CACHES, TIMES, with_state
from cometlm.backbones.rotary import AllKinds, Given, Rotation
from cometlm.backbones.text_half import attending_by, language_model, text_config
from cometlm.backbones.watching import (
    NAME,
    Attended,
    Called,
    Record,
    UnsupportedBackboneError,
    first,
    refusal,
    watch,
)
from cometlm.config import depth

_MASK = "attention_mask"
# What the attention interface may be given; anything else that is a tensor is a refusal.
_KNOWN_TENSORS = ("s_aux", "position_ids")


def discover(backbone: PreTrainedModel) -> Parts:
    """Watch a backbone read, and take over how its layers are called.

    Raises:
        UnsupportedBackboneError: it cannot be given a memory; says which layer and why.
    """
    layers = _layers(backbone)
    sample, record = watch(backbone, layers)
    _check_chain(backbone, layers, record)
    with attending_by(backbone, NAME), torch.no_grad():
        calls, rotations = _calls(backbone, layers, record)
    scale, positions, embed_norm = _embedding(backbone, record)
    return Parts(
        family=None,
        config=text_config(backbone),
        embed_tokens=backbone.get_input_embeddings(),
        layers=layers,
        calls=calls,
        rotations=rotations,
        norm=_norm(backbone, record),
        lm_head=backbone.get_output_embeddings(),
        scale=scale,
        positions=positions,
        embed_norm=embed_norm,
        sample=sample,
    )


def _layers(backbone: PreTrainedModel) -> list[nn.Module]:
    """The decoder's layers: the first list of modules that is as long as the config says."""
    count = depth(text_config(backbone))
    for module in language_model(backbone).modules():
        if count and isinstance(module, nn.ModuleList) and len(module) >= count:
            return list(module)[:count]
    raise refusal(backbone, f"no list of its {count or '?'} layers was found in it")


def _same(a: Any, b: Any) -> bool:
    """Whether two are one tensor, or of one shape and equal."""
    if a is b:
        return True
    both = isinstance(a, Tensor) and isinstance(b, Tensor)
    return both and a.shape == b.shape and a.dtype == b.dtype and bool((a == b.to(a.device)).all())


def _check_chain(backbone: PreTrainedModel, layers: Sequence[nn.Module], record: Record) -> None:
    """Each layer runs once, in order, on what the one before it left."""
    for i, layer in enumerate(layers):
        times = sum(called.module is layer for called in record.layers)
        if times != 1:
            name = type(layer).__name__
            raise refusal(backbone, f"layer {i} ({name}) runs {times} times for a token, not once")
    if [id(called.module) for called in record.layers] != [id(layer) for layer in layers]:
        raise refusal(backbone, "its layers do not run one after the other")
    for i in range(1, len(layers)):
        given = record.layers[i].entered
        if not _same(given, record.layers[i - 1].left):
            why = f"what layer {i - 1} leaves is not all that enters layer {i}"
            raise refusal(backbone, why)


def _calls(
    backbone: PreTrainedModel, layers: Sequence[nn.Module], record: Record
) -> tuple[list[LayerCall], list[Rotation]]:
    calls, rotations = [], []
    for i, (layer, called) in enumerate(zip(layers, record.layers, strict=True)):
        label = f"layer {i} ({type(layer).__name__})"
        try:
            call, rotation = _call_of(called, record)
            parts = {id(part) for part in layer.modules()}
            attended = [one for one in record.attended if id(one.module) in parts]
            call = _with_attention(call, called, attended, record)
            table = _table(rotation, called.entered, TIMES)
            call = with_state(call, layer, called.entered, table)
            calls.append(call if call.attention is None else _told(call, called, rotation))
        except UnsupportedBackboneError as error:
            raise refusal(backbone, f"{label} {error}") from error
        rotations.append(rotation)
    if all(call.attention is None for call in calls):
        raise refusal(
            backbone,
            "none of its layers calls transformers' attention interface: nothing reads a memory",
        )
    return calls, rotations


def _call_of(called: Called, record: Record) -> tuple[LayerCall, Rotation]:
    """How a layer is called, and where its rotary table comes from."""
    _, *rest = called.given.items()
    hidden = called.entered
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        raise UnsupportedBackboneError("does not take hidden states [batch, items, width]")
    options: dict[str, Any] = {}
    rotary = positions = None
    alone, rotation = False, Rotation(None)
    for name, value in rest:
        source = _rotation_of(value, record)
        if name == _MASK or name in CACHES:
            options[name] = None
        elif source is not None:
            rotary, alone, rotation = name, isinstance(value, Tensor), source
        elif isinstance(value, Tensor) and _are_positions(value, hidden.shape[1]):
            positions = name
        elif _holds_tensors(value) or isinstance(value, (Mapping, list)):
            raise UnsupportedBackboneError(f"is given {name!r}, which depends on the text or place")
        else:
            options[name] = value
    if positions is not None:
        rotation = replace(rotation, with_positions=True)
    if rotation.module is None and positions is None:  # a table says where a layer's items stand
        rotation = Rotation(None, with_positions=True)
    call = LayerCall(
        options=options, rotary=rotary, alone=alone, positions=positions, kinds=rotation.kinds
    )
    return call, rotation


def _are_positions(value: Tensor, length: int) -> bool:
    if value.is_floating_point() or value.shape[-1] != length or value.dim() > 3:
        return False
    from_zero = value - value[..., :1]  # some count from 1, which no rotation sees
    return bool((from_zero == torch.arange(length, device=value.device)).all())


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensors, value.values()))
    if isinstance(value, (tuple, list)):
        return any(map(_holds_tensors, value))
    return isinstance(value, Tensor)


def _rotation_of(value: Any, record: Record) -> Rotation | None:
    """The call outside of layers that made a value which layers are given, if one did."""
    if not _holds_tensors(value) or isinstance(value, Mapping):
        return None
    parts = [value] if isinstance(value, Tensor) else list(value)
    for called in record.others:
        made = [called.out] if isinstance(called.out, Tensor) else called.out
        if not isinstance(made, (tuple, list)) or len(made) != len(parts):
            continue
        if all(a is b for a, b in zip(made, parts, strict=True)):
            return _rotation(called)
    return None


def _rotation(called: Called) -> Rotation | None:
    def meant(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.is_floating_point():
            return Given.LIKE
        return AllKinds(len(value)) if value.dim() == 3 else Given.POSITIONS

    args = tuple(meant(value) for value in called.args)
    kwargs = tuple((name, meant(value)) for name, value in called.kwargs.items())
    made, given = first(called.out), (*args, *dict(kwargs).values())
    four = isinstance(made, Tensor) and made.dim() == 4
    kinds = len(made) if four and AllKinds(len(made)) in given else 0
    rotation = Rotation(called.module, args, kwargs, kinds=kinds)
    try:
        hash(rotation)
    except TypeError:
        return None
    return rotation


def _with_attention(
    call: LayerCall, called: Called, attended: Sequence[Attended], record: Record
) -> LayerCall:
    """The call, with what the layer asks of attention."""
    if not attended:
        return replace(call, attention=None)
    if len(attended) != 1:
        raise UnsupportedBackboneError(
            f"calls {len(attended)} times transformers' attention interface, so it has no one set "
            "of keys and values"
        )
    (one,) = attended
    if one.key.dim() != 4 or one.key.shape[2] != called.left.shape[1]:
        raise UnsupportedBackboneError("attends to something else than the items of its text")
    for name, value in one.options.items():
        if _holds_tensors(value) and name not in _KNOWN_TENSORS:
            raise UnsupportedBackboneError(f"gives its attention {name!r}, which is not understood")
    if one.options.get("is_causal") is False or not getattr(one.module, "is_causal", True):
        raise UnsupportedBackboneError("looks at what follows: its attention is not causal")
    names = {id(part): name for name, part in called.module.named_modules()}
    said: int | None = one.options.get("sliding_window")
    window = _window(one.mask, said, record)
    window = window if window != said else None
    return replace(call, attention=names[id(one.module)], window=window)


def _told(call: LayerCall, called: Called, rotation: Rotation) -> LayerCall:
    """The call in a form by which the attention function hears of it."""
    hidden = called.entered
    table = _table(rotation, hidden)
    for aside in dict.fromkeys((call.aside, True)):
        one = replace(call, aside=aside)
        try:
            one.key_value(called.module, hidden, table)
        except (TypeError, ValueError, RuntimeError, IndexError):
            # It does not take the argument, or keeps it to itself.
            continue
        return one
    raise UnsupportedBackboneError("cannot be run by itself")


def _table(rotation: Rotation, hidden: Tensor, times: int = 1) -> RotaryTable:
    """Rows of a rotary table for items [1, n, D], or for so many times as many."""
    return tuple(part[None] for part in rotation.table(times * hidden.shape[1], hidden))


def _window(mask: Tensor | None, said: int | None, record: Record) -> int | None:
    """How far a layer's mask lets an item look back."""
    found = next((one for one in record.masks if one.made is mask), None)
    if found is None and mask is not None and record.masks:
        alike = next((one for one in record.masks if _same(one.made, mask)), None)
        if alike is None or any(one.local_size is not None for one in record.masks):
            raise UnsupportedBackboneError("changes its attention mask")
        found = alike
    if found is None:
        return said
    window = found.local_size
    if window is None:
        if said is not None:
            raise UnsupportedBackboneError(f"has a window of {said} that its mask lacks")
        return None
    last = torch.tensor(window)
    if [bool(found.sees(0, 0, last, torch.tensor(place))) for place in (0, 1)] != [False, True]:
        raise UnsupportedBackboneError("attends in blocks, which is no window")
    return window


def _embedding(
    backbone: PreTrainedModel, record: Record
) -> tuple[float, LearnedPositions | None, nn.Module | None]:
    """What becomes of an embedding before the first layer."""
    embed = backbone.get_input_embeddings()
    own = next((called for called in record.others if called.module is embed), None)
    if own is None:
        raise refusal(backbone, "its embedding is not called on ids")
    hidden = record.layers[0].entered
    width = hidden.shape[-1]
    scales = [1.0, math.sqrt(width)]
    for name in ("embedding_multiplier", "scale_emb"):
        scales.append(float(getattr(text_config(backbone), name, None) or 1.0))
    tables: list[LearnedPositions | None] = [None]
    found = (_learned(called, embed) for called in record.others)
    tables += [one for one in found if one and one.rows >= hidden.shape[1]]
    for scale in dict.fromkeys(scales):
        scaled = own.out if scale == 1 else own.out * scale
        for table in tables:
            enters = scaled
            if table is not None:
                places = torch.arange(hidden.shape[1], device=hidden.device)[None]
                enters = enters + table(places)
            if enters.shape == hidden.shape and _close(enters, hidden):
                return scale, table, None
        for called in record.others:  # a norm of the embedding
            if called.args and _same(called.args[0], scaled) and _same(called.out, hidden):
                return scale, None, called.module
    raise refusal(
        backbone,
        "what enters its first layer is no embedding, scaled or normed, or with positions added",
    )


def _close(a: Tensor, b: Tensor) -> bool:
    tolerance = 8 * torch.finfo(b.dtype).eps
    return bool(torch.allclose(a.to(b.dtype), b, rtol=tolerance, atol=tolerance * float(b.std())))


def _proportional(a: Any, b: Any) -> bool:
    if _same(a, b):
        return True
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape:
        return False
    a, b = (x.double() / x.double().norm() for x in (a, b))
    return bool((a - b.to(a.device)).abs().max() < 1e-2)


def _learned(called: Called, embed: nn.Module) -> LearnedPositions | None:
    """A table of positions: an embedding other than that of tokens."""
    module, out = called.module, called.out
    if module is embed or not isinstance(module, nn.Embedding) or not isinstance(out, Tensor):
        return None
    rows = out.reshape(-1, out.shape[-1])
    place = torch.arange(len(rows), device=rows.device)
    for offset in range(min(4, module.num_embeddings - len(rows) + 1)):
        learned = LearnedPositions(module, offset)
        if not module.weight.is_meta or type(module).forward is nn.Embedding.forward:
            found = learned(place)
            if found.shape == rows.shape and torch.equal(found.to(rows), rows):
                return learned
    return None


def _norm(backbone: PreTrainedModel, record: Record) -> nn.Module:
    """What stands between the last layer and the head; what scales after it is `logits`' part."""
    head = backbone.get_output_embeddings()
    last = record.layers[-1].left
    entered = next((c.args[0] for c in record.others if c.module is head and c.args), None)
    for called in record.others:
        takes_it = called.module is not head and called.args and _same(called.args[0], last)
        if takes_it and _proportional(called.left, entered):
            return called.module
    raise refusal(backbone, "no norm stands between its last layer and its head")
