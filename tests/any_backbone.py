"""Every type of causal language model that transformers lists, tiny, and what `attach` says.

`python -m tests.any_backbone` writes the tables of docs/backbones.md. No type is named here but by
transformers; a type's config is shrunk by the names of its fields.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import cometlm
from cometlm.backbones.families import FAMILIES
from cometlm.core.reference import reference_logits
from tests.tiny import SMALL, error, random_ids, scramble

MODEL_TYPES = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - {"cometlm"})  # transformers' own
PAGE = Path(__file__).parents[1] / "docs" / "backbones.md"
END = "<!-- end -->\n"
COUNT = 43  # tokens: three chunks and a rest
_MOST_WEIGHTS = 14_000_000
# What configs and models raise at sizes that they were not made for.
FAILURES = (
    RuntimeError, ValueError, TypeError, AttributeError, LookupError, ImportError, AssertionError,
    ArithmeticError, StrictDataclassError,
)  # fmt: skip

# Fields of configs by what they mean; a config gets those that it has.
_WIDTHS = dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 32)
_HEADS = dict.fromkeys(
    ("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"), 4
) | {"encoder_attention_heads": 4}
_INNER = dict.fromkeys(
    ("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim"), 48
)
_POSITIONS = dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 256)
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
_EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "n_shared_experts": 1,
    "num_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "expert_ffn_hidden_size": 16, "moe_num_experts": 4, "moe_topk": 2, "ffn_hidden_size": 48,
    "zero_expert_num": 1, "moe_shared_expert_intermediate_size": 16,
}  # fmt: skip
_LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 8, "index_topk": 8, "index_head_dim": 8, "index_n_heads": 2,
}  # fmt: skip
_RECURRENT = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "state_size": 8,
    "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "lru_width": 32, "attention_window_size": 7,
    "mamba_d_ssm": 64, "mamba_chunk_size": 8, "chunk_size": 8, "attn_layer_indices": [1],
    "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4,
    "n_groups": 1, "mamba_ngroups": 1,
}  # fmt: skip
# Kinds of layers, by a field that only types with the first kind have; their default config has
# one kind, though published checkpoints have both.
_KINDS = {
    "conv_L_cache": ("conv", "full_attention"),
    "mamba_d_conv": ("linear_attention", "full_attention"),
}
_LISTS_OF_KINDS = ("layer_types", "layers_block_type")
_REST = {
    "vocab_size": 96, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 7,
    "rotary_dim": 4, "encoder_layers": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96, "is_decoder": True,
}  # fmt: skip
_SMALLER = {
    **_WIDTHS,
    **_HEADS,
    **_INNER,
    **_POSITIONS,
    **_EXPERTS,
    **_LATENT,
    **_RECURRENT,
    **_REST,
}
# Tried one after the other: fields that do not fit with each other in some types.
_ATTEMPTS: tuple[dict[str, Any], ...] = (
    {},
    {"head_dim": None, "num_key_value_heads": 4},
    {"head_dim": None},
    {"head_dim": None, "num_key_value_heads": None, "is_decoder": None},
    {"num_experts_per_tok": 1},
    {"num_heads": 8},
    {"attention_types": [[["global", "local"], 1]]},
    dict.fromkeys((*_EXPERTS, *_RECURRENT, "head_dim")),
)


@dataclass(frozen=True)
class Outcome:
    """What became of a type.

    Attributes:
        attaches: it does, and is exact.
        why: where it does not, or cannot be built.
        figures: largest differences, by what was compared.
        remarks: what its layers ask for.
    """

    model_type: str
    attaches: bool
    why: str = ""
    figures: tuple[tuple[str, float], ...] = ()
    remarks: str = ""


class CannotBuildError(Exception):
    """No tiny model of a type can be made."""


def tiny(model_type: str) -> PreTrainedModel:
    """A random model in float64, with a layer of each kind that its default config has.

    Raises:
        CannotBuildError: says why.
    """
    text = _text_half(model_type)
    if text is not None:
        raise CannotBuildError(f"multimodal; its text half is `{text}`")
    return built(AutoModelForCausalLM, configs(model_type), _MOST_WEIGHTS)


def built(auto: Any, candidates: Iterator[Any], most: int) -> PreTrainedModel:
    """A random model in float64, of the first config that makes one that runs.

    Args:
        auto: transformers' class that makes models of configs.
        candidates: configs, or why one cannot be made.
        most: weights that it may have.

    Raises:
        CannotBuildError: says why the last could not be used.
    """
    why = "it has no config"
    for config in candidates:
        if isinstance(config, Exception):
            why = first_line(config)
            continue
        try:
            config._experts_implementation = "eager"  # the grouped kernels have no float64
            with torch.device("meta"):
                weights = auto.from_config(config).num_parameters()
            if weights > most:
                why = f"{weights / 1e6:.0f} million weights are left of it"
                continue
            torch.manual_seed(0)
            model: PreTrainedModel = auto.from_config(config).double().eval()
            scramble(model, 0.3)
            with torch.no_grad():
                model(input_ids=torch.tensor([[5, 6, 7, 8]]), use_cache=False)
        except FAILURES as problem:
            why = first_line(problem)
            continue
        return model
    raise CannotBuildError(why)


def _text_half(model_type: str) -> str | None:
    """The type of a multimodal type's text half."""
    try:
        base: Any = AutoConfig.for_model(model_type)
        text = base.get_text_config(decoder=True)
    except FAILURES:
        return None
    return None if text.model_type == base.model_type else str(text.model_type)


def configs(model_type: str) -> Iterator[Any]:
    """Small configs of a type, the best first; or why one cannot be made."""
    try:
        base: Any = AutoConfig.for_model(model_type)
    except FAILURES as problem:
        yield problem
        return
    for attempt in _ATTEMPTS:
        latent = _value(base, "kv_lora_rank") is not _MISSING  # then each head has keys of its own
        smaller = _SMALLER | ({"head_dim": 4, "num_key_value_heads": 4} if latent else {}) | attempt
        wanted = {name: x for name, x in smaller.items() if x is not None}
        kinds = _kinds(base)
        depth = max(2, len(kinds))
        wanted |= dict.fromkeys(_DEPTHS, depth)
        lists = [name for name in _LISTS_OF_KINDS if _value(base, name) is not _MISSING]
        listed = [{name: (kinds * 2)[:depth] for name in lists if kinds}, {}]
        for more in listed if listed[0] else ({},):
            for unset in (_MISSING, None):  # fields that are None by default may be meant to be
                fields = {
                    n: x for n, x in wanted.items() if _value(base, n) not in (_MISSING, unset)
                }
                try:
                    yield AutoConfig.for_model(model_type, **fields, **more)
                except FAILURES as problem:
                    yield problem


def _kinds(base: Any) -> list[str]:
    """Kinds of a type's layers, each once."""
    kinds = list(dict.fromkeys(_value(base, "layer_types") or ()))
    for name, both in _KINDS.items():
        if _value(base, name) is not _MISSING and len(kinds) < 2 and kinds != ["hybrid"]:
            return list(both)
    return kinds


_MISSING = object()


def _value(config: Any, name: str) -> Any:
    try:
        value = getattr(config, name, _MISSING)
    except FAILURES:  # each type has its own ways to say that it has none
        return _MISSING
    return None if name == "layer_types" and value is _MISSING else value


def first_line(problem: Exception) -> str:
    return " ".join(str(problem).split())[:160] or type(problem).__name__


class Wide(TorchFunctionMode):
    """Where code asks for float32 of a float64 tensor, it stays float64.

    Scans and linear attention are float32 in transformers, whatever the weights are; comparing
    would show how they round.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call a function of torch."""
        wide = any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in args)
        if wide and func is Tensor.float:
            return args[0]
        if wide and func in (Tensor.to, Tensor.type):
            args = tuple(torch.float64 if x is torch.float32 else x for x in args)
        if wide and func is Tensor.matmul:  # rotary tables: some are kept in float32
            args = tuple(x.double() for x in args)
        return func(*args, **(kwargs or {}))


def outcome(model_type: str, make: Callable[[str], PreTrainedModel] = tiny) -> Outcome:
    """Attach a memory to a tiny model of a type and compare."""
    try:
        backbone = make(model_type)
    except CannotBuildError as problem:
        said = str(problem)
        why = said if said.startswith("multimodal") else f"not built tiny: {said}"
        return Outcome(model_type, attaches=False, why=why)
    ids = random_ids(COUNT)
    with torch.no_grad():
        before = backbone(input_ids=ids[None], use_cache=False).logits
    try:
        figures = {"without memory": _without_memory(backbone, ids)}
        model = cometlm.attach(backbone, **SMALL)
    except ValueError as problem:
        said = str(problem).split(" cannot be given a memory: ")[-1]
        return Outcome(model_type, attaches=False, why=said)
    scramble(model.model.comet, 0.5)
    with Wide() if _carrying(model) else nullcontext():
        figures |= {**_against_reference(model, ids), **_however_it_is_cut(model, ids)}
    remarks = _remarks(model)
    returned = cometlm.detach(model)
    with torch.no_grad():
        after = returned(input_ids=ids[None], use_cache=False).logits
    figures["detached"] = float((after - before).abs().max())
    return Outcome(model_type, True, figures=tuple(figures.items()), remarks=remarks)


@torch.no_grad()
def _without_memory(backbone: PreTrainedModel, ids: Tensor) -> float:
    """How far logits of a text of one chunk are from the backbone's own, where nothing is kept."""
    with Wide():
        want = backbone(input_ids=ids[None], use_cache=False).logits
        off = {"global_memory": False, "temporary_memory": False, "chunk_size": len(ids)}
        model = cometlm.attach(backbone, **off)
        found = error(model(ids[None]).logits, want)
    cometlm.detach(model)
    return found


def _against_reference(model: cometlm.CometForCausalLM, ids: Tensor) -> dict[str, float]:
    weights = torch.randn(len(ids), 96, dtype=torch.float64)
    fast = model(ids[None]).logits[0]
    (fast * weights).sum().backward()
    ours = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    naive = reference_logits(model, ids)
    (naive * weights).sum().backward()
    theirs = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    found = {"logits": error(fast, naive), "gradients": 0.0}
    largest = max(float(grad.abs().max()) for grad in theirs.values() if grad is not None)
    for name, grad in theirs.items():
        mine = ours[name]
        # A bias that all keys share changes no weight: its gradient is rounding, in both.
        if grad is None or float(grad.abs().max()) < 1e-12 * largest:
            assert mine is None or float(mine.abs().max()) < 1e-12 * largest, name
            continue
        assert mine is not None, name
        found["gradients"] = max(found["gradients"], error(mine, grad))
    return found


@torch.no_grad()
def _however_it_is_cut(model: cometlm.CometForCausalLM, ids: Tensor) -> dict[str, float]:
    whole = model(ids[None]).logits[0]
    cache, parts = None, []
    for piece in ids.split(5):
        out = model(piece[None], past_key_values=cache)
        cache = out.past_key_values
        parts.append(out.logits[0])
    rows = torch.stack([ids, ids.roll(14)])
    rows[1, :14] = 0
    mask = torch.ones_like(rows)
    mask[1, :14] = 0
    both = model(rows, attention_mask=mask).logits
    ragged = max(error(both[0], whole), error(both[1, 14:], whole[:-14]))
    return {"pieces": error(torch.cat(parts), whole), "ragged": ragged}


def _carrying(model: Any) -> list[Any]:
    """Cells of layers that carry a state of their own."""
    return [cell for cell in model.model.cells if cell.call.cache is not None]


def _remarks(model: Any) -> str:
    """What the layers of a type ask for, in words."""
    said, config = [], model.config.backbone_config
    cells = list(model.model.cells)
    if config.model_type in FAMILIES:
        said.append("row")
    attending = [cell for cell in cells if cell.attends]
    if any(cell.call.rotary is None for cell in attending):
        some = "" if all(cell.call.rotary is None for cell in attending) else "some layers "
        said.append("learned positions" if model.model.embed_positions else f"{some}no tables")
    types = set(getattr(config, "layer_types", None) or ())
    if "sliding_attention" in types or getattr(config, "sliding_window", None):
        said.append("windows")
    carrying = _carrying(model)
    if any(cell.attends for cell in carrying):
        said.append("layers with a state beside attention")
    elif carrying:
        said.append("layers with a state")
    if any(cell.call.stepwise for cell in carrying):
        said.append("token by token")
    names = {name for name, _ in model.named_parameters()}
    if any(name.endswith("sinks") for name in names):
        said.append("sinks")
    if getattr(config, "attn_logit_softcapping", None):
        said.append("softcap")
    if any("kv_a_proj" in name for name in names):
        said.append("latent attention")
    if any(re.search(r"experts\.", name) for name in names):
        said.append("experts")
    return ", ".join(said)


def tables(found: list[Outcome]) -> str:
    """The two tables of the page."""
    return two_tables(
        found,
        "Of {all} model types, **{fit} attach**:",
        "The other {rest} do not, could not be built tiny, or read images too (above); `attach` "
        "names the layer and the reason:",
    )


def two_tables(found: list[Outcome], fitting: str, others: str) -> str:
    """Which attach, and why the others do not.

    Args:
        fitting: stands above the one table, with `{all}`, `{fit}` and `{rest}` for counts.
        others: stands above the other.
    """
    fit = [one for one in found if one.attaches]
    rest = [one for one in found if not one.attaches]
    counts = {"all": len(found), "fit": len(fit), "rest": len(rest)}
    lines = [
        fitting.format(**counts),
        "",
        "| model type | what its layers ask for |",
        "|---|---|",
        *(f"| `{one.model_type}` | {one.remarks} |" for one in fit),
        "",
        others.format(**counts),
        "",
        "| model type | why |",
        "|---|---|",
        *(f"| `{one.model_type}` | {one.why.replace('|', '/')} |" for one in rest),
    ]
    return "\n".join(lines) + "\n"


BEGIN = "<!-- made by python -m tests.any_backbone -->\n"


def walk(
    types: list[str],
    look: Callable[[str], Outcome],
    table: Callable[[list[Outcome]], str],
    begin: str,
) -> None:
    """Look at the types that the command line names, or at all, and write their table.

    Args:
        begin: the line of the page after which it stands; it goes on to `END`.
    """
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    found = []
    for model_type in sys.argv[1:] or types:
        one = look(model_type)
        print(model_type, one.attaches, one.why, *one.figures, one.remarks, flush=True)
        found.append(one)
    if not sys.argv[1:]:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(begin)
        after = rest.partition(END)[2]
        PAGE.write_text(f"{before}{begin}\n{table(found)}\n{END}{after}", encoding="utf-8")


def written(begin: str) -> str:
    """What stands on the page for what `walk` would write."""
    return PAGE.read_text(encoding="utf-8").partition(begin)[2].partition(END)[0]


if __name__ == "__main__":
    walk(MODEL_TYPES, outcome, tables, BEGIN)
