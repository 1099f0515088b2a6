"""What differs between the versions of torch and transformers that this package runs beside.

Every difference is met here and says which version it is of; the rest of the package is written for
the newest. When the oldest version moves up, what is below it can go.

Private entries of torch that the package uses are looked up here too, each with a fallback through
public API and a word on what is lost without it.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
import transformers
from packaging.version import InvalidVersion, Version
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

_Function = TypeVar("_Function", bound=Callable[..., Any])

# The oldest version that is tested, and the newest one known: first and last of `make test-matrix`.
TESTED = {"torch": ("2.9", "2.15"), "transformers": ("5.10", "5.24")}
# Older torch is worse than untested: in 2.8 the CPU's flash attention reads beyond its keys where
# queries are grouped, which is a wrong answer or a crash.


def check_versions(torch_version: str, transformers_version: str) -> None:
    """Refuse versions that are too old, and warn once of versions that are newer than any tested.

    Raises:
        ImportError: names both versions and the oldest ones.
    """
    here = {"torch": torch_version, "transformers": transformers_version}
    named = " and ".join(f"{name} {version}" for name, version in here.items())
    try:
        minor = {name: Version(version).release[:2] for name, version in here.items()}
    except InvalidVersion:  # somebody's own build
        warnings.warn(f"cometlm does not know the versions {named}", stacklevel=3)
        return
    if any(minor[name] < Version(oldest).release for name, (oldest, _) in TESTED.items()):
        oldest = " and ".join(f"{name}>={oldest}" for name, (oldest, _) in TESTED.items())
        raise ImportError(f"cometlm needs {oldest}, here are {named}")
    if any(minor[name] > Version(newest).release for name, (_, newest) in TESTED.items()):
        newest = " and ".join(f"{name} {newest}" for name, (_, newest) in TESTED.items())
        warnings.warn(
            f"cometlm was tested with versions up to {newest}, here are {named}", stacklevel=3
        )


check_versions(torch.__version__, transformers.__version__)


# --- transformers before `response_template`: `response_schema`, which needs no prompt ---


def describes_answers(tokenizer: Any) -> bool:
    """Whether a tokenizer says how its model's answers are made up."""
    names = ("response_template", "response_schema")
    return any(getattr(tokenizer, name, None) is not None for name in names)


def parsed_answer(tokenizer: Any, text: str, prompt: str, tools: list[Any]) -> dict[str, Any]:
    """An answer as a message, by a tokenizer that `describes_answers`.

    Args:
        tokenizer: it.
        text: the answer with its control tokens.
        prompt: what stands in front of it.
        tools: what may be called, in the form of chat templates.

    Raises:
        ValueError: it is none that the tokenizer describes.
    """
    if getattr(tokenizer, "response_template", None) is not None:
        said = tokenizer.parse_response(text, prefix=prompt, tools=tools)
    else:
        said = tokenizer.parse_response(text)
    return dict(said)


# --- transformers 5.24: what a call goes on from is `cache`, before it was `past_key_values` ---

CACHE = (
    "cache"
    if "cache" in {field.name for field in fields(CausalLMOutputWithPast)}
    else "past_key_values"
)


def takes_either_name(function: _Function) -> _Function:
    """Let a function that takes `past_key_values` be called with `cache` as well.

    Raises (when called):
        ValueError: both are given.
    """

    @functools.wraps(function)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        if "cache" in kwargs:
            cache = kwargs.pop("cache")
            if kwargs.get("past_key_values") is not None:
                raise ValueError("cache and past_key_values are one thing; give one of them")
            kwargs["past_key_values"] = cache
        return function(*args, **kwargs)

    return cast("_Function", renamed)


_OTHER = "past_key_values" if CACHE == "cache" else "cache"

# An output has its cache under both names; transformers' own logs a warning of the older one.
EitherName: Any = type("EitherName", (), {_OTHER: property(lambda self: getattr(self, CACHE))})


# --- transformers 5.22: a layer asks a cache for its states, before it looked into `layers` ---


class StatesByLayer:
    """What 5.17 and later read of a cache's layer, from a cache that is asked for states.

    In earlier versions a layer has one state of each kind, which it reads and writes otherwise:
    models whose layers carry states of their own are refused there.
    """

    @property
    def layers(self) -> Any:
        """Any layer is the one that this cache is for."""
        cache: Any = self
        states = (_ByNumber(cache.get_conv_state), _ByNumber(cache.get_recurrent_state))
        return _ByNumber(lambda *_: _LayerStates(*states))


class _ByNumber:
    """Looked up by a number, and found by a function."""

    def __init__(self, find: Callable[[int, int], Any]) -> None:
        self._find = find

    def __getitem__(self, number: int) -> Any:
        return self._find(0, number)


class _LayerStates(NamedTuple):
    """One layer's states, each kind by its number."""

    conv_states: _ByNumber
    recurrent_states: _ByNumber
    record_past: bool = False


# --- transformers 5.23: `activation_checkpointing_*`, before it was `gradient_checkpointing_*` ---

if hasattr(transformers.PreTrainedModel, "activation_checkpointing_enable"):
    ACTIVATION_CHECKPOINTING = "activation_checkpointing"

    class CheckpointingSwitches:
        """Nothing: transformers' switches call what a model overrides."""

else:
    ACTIVATION_CHECKPOINTING = "gradient_checkpointing"

    class CheckpointingSwitches:  # type: ignore[no-redef]
        """The newer switches, and the older ones leading to them."""

        def activation_checkpointing_enable(
            self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
        ) -> None:
            """Recompute activations in the backward pass."""
            model: Any = self
            model._activation_checkpointing_enable(activation_checkpointing_kwargs, **options)

        def activation_checkpointing_disable(self) -> None:
            """Keep activations."""
            model: Any = self
            model._activation_checkpointing_disable()

        def gradient_checkpointing_enable(
            self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
        ) -> None:
            """The older name of `activation_checkpointing_enable`; 5.17 has options beside it."""
            self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

        def gradient_checkpointing_disable(self) -> None:
            """The older name of `activation_checkpointing_disable`."""
            self.activation_checkpointing_disable()

        @property
        def is_gradient_checkpointing(self) -> bool:
            """The older name of `is_activation_checkpointing`."""
            model: Any = self
            return bool(model.is_activation_checkpointing)


# --- torch 2.11: `torch.cpu.get_capabilities` ---

_CPU_INFO = Path("/proc/cpuinfo")


def cpu_abilities() -> dict[str, Any]:
    """What the CPU can do, by torch's names; before 2.11 only whether it multiplies bfloat16."""
    if hasattr(torch.cpu, "get_capabilities"):
        return dict(torch.cpu.get_capabilities())
    try:
        return {"bf16": "bf16" in _CPU_INFO.read_text(encoding="utf-8")}
    except OSError:  # no Linux, or one that does not tell
        return {"bf16": False}


# --- torch 2.13: `torch.accelerator.Graph`, before it each device's own ---


class Graph(NamedTuple):
    """What records a device's work between `begin` and `end`; other threads may go on meanwhile."""

    begin: Callable[[], None]
    end: Callable[[], None]
    replay: Callable[[], None]
    pool: Callable[[], Any]


def new_graph(device: torch.device, pool: Any = None) -> Graph | None:
    """A graph to record a device's work in; None for a device without, CPUs among them.

    Args:
        pool: of the memory of another graph, which this one shares; None: its own.
    """
    if device.type == "cpu":
        return None
    if hasattr(torch.accelerator, "Graph"):
        graph = torch.accelerator.Graph(pool=pool, capture_error_mode="thread_local")
        return Graph(graph.capture_begin, graph.capture_end, graph.replay, graph.pool)
    kind = getattr(torch.get_device_module(device), f"{device.type.upper()}Graph", None)
    if kind is None:
        return None
    own = kind()
    begin = functools.partial(own.capture_begin, pool=pool, capture_error_mode="thread_local")
    return Graph(begin, own.capture_end, own.replay, own.pool)


# --- private entries of torch ---


def cpu_flash_attention() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """The CPU's flash attention with its log-sum-exp, forward and backward.

    Without it (None), attention to memory and chunk is one masked call: as exact, and on a CPU some
    1.4 times as slow at the paper's sizes (docs/lab-notes.md).
    """
    forward = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    backward = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
    return None if forward is None or backward is None else (forward, backward)


class PackedLinear(NamedTuple):
    """Products with a weight in the order that a CPU's kernels read it.

    Attributes:
        pack: from a weight [out, in] to the same in that order.
        product: of inputs [..., in] with a packed weight and a bias.
    """

    pack: Callable[[Tensor], Tensor]
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor]


def packed_linear() -> PackedLinear | None:
    """OneDNN's products with packed weights, which torch keeps for its compiler; None without."""
    ops = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(ops, "_linear_pointwise"):
        return None
    kernel = ops._linear_pointwise.default

    def product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        made: Tensor = kernel(x, packed, bias, "none", [], "")
        return made

    return PackedLinear(ops._reorder_linear_weight.default, product)


# What operations on a tensor's subclass give: plain tensors. Without it, the subclass again.
PLAIN_RESULTS = getattr(torch._C, "_disabled_torch_function_impl", torch.Tensor.__torch_function__)


def backward_pass() -> int | None:
    """A number that is another one in every backward pass; only inside of one.

    Without it (None), passes are told apart by the order that spans of chunks run in; then a pass
    that is broken off from outside, followed by one from an earlier chunk of the same call, would
    hand on the first one's gradients too.
    """
    number = getattr(torch._C, "_current_graph_task_id", None)
    return None if number is None else int(number())


def leave_to_itself(trainer: Any) -> None:
    """Leave placement and gradients of a Trainer's model, which is sharded already, to the model.

    transformers 5.19 and later have a field that says so. Earlier ones (5.17) would wrap the model
    in DDP, which cannot take sharded weights.
    """
    if hasattr(trainer, "is_distributed_loading_by_transformers"):
        trainer.is_distributed_loading_by_transformers = True
    else:
        trainer.accelerator.prepare_model = lambda model, *_, **__: model
