"""peft's adapters on a model: the switches that transformers gives its models, for any peft.

Those of transformers 5.24 require peft 0.22; these do the same with older ones.

Pitfalls:
    - Only kinds that a checkpoint can hold and load again are taken: those of `KINDS`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

if TYPE_CHECKING:
    from peft import PeftConfig


KINDS = ("LORA", "IA3")
MEMORY = "comet"  # the module that holds all of a memory's weights
# Names of the module inside of what peft puts round one; an adapter's own weights are beside it.
_INSIDE = ("base_layer", "original_module", "token_adapter")


class AdapterMixin:
    """Adapters that stand beside the weights they adapt; none of this is there without peft."""

    peft_config: dict[str, Any]
    _hf_peft_config_loaded: bool

    def add_adapter(self, adapter_config: PeftConfig, adapter_name: str | None = None) -> None:
        """Add a fresh adapter and make it the active one.

        Where it is to train the memory beside it (`modules_to_save`), the memory is trained in
        place, not in a copy.

        Args:
            adapter_name: default "default".

        Raises:
            ValueError: there is one of that name; it is of a kind that no checkpoint holds.
            ImportError: peft is not installed.
        """
        from peft import inject_adapter_in_model

        check_kind(adapter_config)
        name = adapter_name or "default"
        if has_adapter(self) and name in self.peft_config:
            raise ValueError(f"adapter_name={name!r} is an adapter that the model has already")
        model, config = cast("Any", self), cast("Any", adapter_config)
        with_memory = MEMORY in (config.modules_to_save or ())
        if with_memory:
            config = without_memory(config)
        config.base_model_name_or_path = self.__dict__.get("name_or_path")
        inject_adapter_in_model(config, model, name)
        if with_memory:
            model.base_model.comet.requires_grad_(True)
        self._hf_peft_config_loaded = True
        for layer in self._adapted():
            layer.train(model.training)  # peft's dropout begins as if it were trained
        self.set_adapter(name)

    def set_adapter(self, adapter_name: list[str] | str) -> None:
        """Make one adapter, or several, the active ones.

        Raises:
            ValueError: the model has none of that name.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        self._check_adapters()
        for name in names:
            if name not in self.peft_config:
                known = ", ".join(self.peft_config)
                raise ValueError(f"adapter_name must be one of {known}, got {name!r}")
        for layer in self._adapted(with_copies=True):
            layer.set_adapter(adapter_name)

    def disable_adapters(self) -> None:
        """Compute without adapters."""
        self._check_adapters()
        for layer in self._adapted(with_copies=True):
            layer.enable_adapters(enabled=False)

    def enable_adapters(self) -> None:
        """Compute with the active adapters again."""
        self._check_adapters()
        for layer in self._adapted(with_copies=True):
            layer.enable_adapters(enabled=True)

    def active_adapters(self) -> list[str]:
        """Names of the active adapters, of whatever layers.

        Raises:
            ValueError: the model has none.
        """
        self._check_adapters()
        found: dict[str, None] = {}  # in their order; peft's delete_adapter() may leave several
        for layer in self._adapted():
            found.update(dict.fromkeys(layer.active_adapters))
        return list(found)

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Weights of one adapter, by their names in a file.

        Args:
            adapter_name: default the active one.
            state_dict: the model's weights, to take instead of its own.

        Raises:
            ValueError: the model has no adapter.
        """
        from peft import get_peft_model_state_dict

        name = adapter_name or self.active_adapters()[0]
        if name not in self.peft_config:
            known = ", ".join(self.peft_config)
            raise ValueError(f"adapter_name must be one of {known}, got {name!r}")
        own: dict[str, Tensor] = get_peft_model_state_dict(
            self,
            state_dict=state_dict,
            adapter_name=name,
            save_embedding_layers=False,  # they are the backbone's; finding out asks the hub
        )
        return own

    def _check_adapters(self) -> None:
        if not has_adapter(self):
            raise ValueError("the model has no adapter; add_adapter() gives it one")

    def _adapted(self, with_copies: bool = False) -> Iterator[Any]:
        """Layers with an adapter; with copies, also modules that peft keeps whole."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import ModulesToSaveWrapper

        kinds = (BaseTunerLayer, ModulesToSaveWrapper) if with_copies else (BaseTunerLayer,)
        modules = cast("nn.Module", self).modules()
        return (module for module in modules if isinstance(module, kinds))


def within(name: str) -> str:
    """The name of a weight without what peft puts round its module."""
    return ".".join(part for part in name.split(".") if part not in _INSIDE)


def has_adapter(model: Any) -> bool:
    """Whether a model has an adapter of peft's beside its weights."""
    if getattr(model, "_hf_peft_config_loaded", False):
        return True
    # A PeftModel round the model says nothing to it but this, and leaves it there after merging.
    return bool(getattr(model, "peft_config", None)) and bool(wrappers(model))


def refuse_merged(model: Any) -> None:
    """Refuse to write a backbone whose weights hold an adapter that stands beside them as well.

    Raises:
        ValueError: it is so.
    """
    if has_adapter(model) and any(layer.merged for layer in model._adapted()):
        raise ValueError(
            "the backbone's weights hold the adapter (merge_adapter()), which loading would add "
            "once more: unmerge_adapter() first, or merge_and_unload() for good"
        )


def check_kind(config: Any) -> None:
    """Refuse an adapter of a kind that a checkpoint cannot hold.

    Raises:
        ValueError: names the kind.
    """
    if not hasattr(config, "peft_type"):
        raise ValueError(f"adapter_config must be a config of peft's, got {type(config).__name__}")
    kind = getattr(config.peft_type, "value", config.peft_type)
    if getattr(config, "is_prompt_learning", False) or getattr(config, "is_adaption_prompt", False):
        raise ValueError(
            f"peft_type {kind} puts tokens or keys of its own before a text, which a memory would "
            f"have to carry from chunk to chunk: it is not supported, use {' or '.join(KINDS)}"
        )
    refuse_offsets(config)
    if kind not in KINDS:
        raise ValueError(
            f"peft_type must be {' or '.join(KINDS)} for an adapter that a checkpoint is to hold, "
            f"got {kind}: merge it into the backbone first (merge_and_unload())"
        )


def refuse_offsets(config: Any) -> None:
    """Refuse an adapter that counts a text's tokens, which come in chunks here.

    Raises:
        ValueError: it is one.
    """
    if getattr(config, "alora_invocation_tokens", None):
        raise ValueError(
            "alora_invocation_tokens must be None: activated LoRA counts tokens from the end of a "
            "text, and a memory reads it chunk by chunk, among tokens of its own"
        )


def without_memory(config: Any) -> Any:
    """An adapter's config that leaves the memory alone: a checkpoint has it elsewhere."""
    config = copy.deepcopy(config)
    kept = [name for name in config.modules_to_save or () if name != MEMORY]
    config.modules_to_save = kept or None
    return config


def base_of(model: Any) -> Any:
    """The model inside a `PeftModel`; any other as it is.

    Raises:
        ValueError: an adapter of a kind that a checkpoint cannot hold.
    """
    for config in (getattr(model, "peft_config", None) or {}).values():
        check_kind(config)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def take_adapters(model: Any, other: nn.Module) -> None:
    """Make another model's adapters, whose layers are this one's, known to this one.

    Their configs then name each adapted module as it is called here, since patterns were meant for
    the other's names. So a model takes those of its backbone, and hands back what it was given.
    """
    configs = getattr(other, "peft_config", None)
    if not configs or not wrappers(model):
        return
    layers = {
        name: module for name, module in model.named_modules() if hasattr(module, "base_layer")
    }
    model.peft_config = {name: _spelled_out(one, name, layers) for name, one in configs.items()}
    model._hf_peft_config_loaded = True


def _spelled_out(config: Any, adapter: str, layers: Mapping[str, Any]) -> Any:
    """An adapter's config with the full names of what it adapts."""
    config = copy.deepcopy(config)
    if getattr(config, "target_parameters", None):
        return config  # of parameters that are no layer's; peft finds these by the ends of names
    kind = getattr(config.peft_type, "value", config.peft_type)
    part = "lora_A" if kind == "LORA" else "ia3_l"
    own = {
        name: layer
        for name, layer in layers.items()
        if adapter in getattr(layer, part, ()) or adapter in getattr(layer, "lora_embedding_A", ())
    }
    config.target_modules = set(own)
    for name in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        if getattr(config, name, None) is not None:
            setattr(config, name, None)
    if kind == "IA3":
        config.feedforward_modules = {name for name, one in own.items() if one.is_feedforward}
    else:
        ranks = {name: one.r[adapter] for name, one in own.items()}
        alphas = {name: one.lora_alpha[adapter] for name, one in own.items()}
        config.rank_pattern = {n: r for n, r in ranks.items() if r != config.r}
        config.alpha_pattern = {n: a for n, a in alphas.items() if a != config.lora_alpha}
    return config


def wrappers(model: nn.Module) -> dict[str, str]:
    """What adapters put round a model's modules: its name, and that of the module inside."""
    return {
        name: inside
        for name, module in model.named_modules()
        for inside in _INSIDE
        if inside in module._modules
    }


def plain_names(model: nn.Module, names: Iterable[str], copied: str = "") -> dict[str, str]:
    """Names of weights, and what they were called before adapters were put round them.

    Adapters' own weights are left out.

    Args:
        names: as in the model's `state_dict()`.
        copied: a module; of it and what is in it, the copies that the active adapter trains are
            meant (peft's `modules_to_save`), not the originals.
    """
    inside = wrappers(model)
    for name in inside:
        wrapper: Any = model.get_submodule(name)
        if copied and f"{name}.".startswith(f"{copied}.") and "modules_to_save" in wrapper._modules:
            inside[name] = f"modules_to_save.{wrapper.active_adapter}"
    found = {name: _unwrapped(name, inside) for name in names}
    return {name: plain for name, plain in found.items() if plain is not None}


def _unwrapped(name: str, inside: Mapping[str, str]) -> str | None:
    """A weight's name without wrappers; None if it is an adapter's."""
    done, plain, rest = "", "", name
    while rest:
        part, _, rest = rest.partition(".")
        done = f"{done}.{part}" if done else part
        plain = f"{plain}.{part}" if plain else part
        while done in inside:
            within = inside[done]
            if not rest.startswith(f"{within}."):
                return None
            done, rest = f"{done}.{within}", rest[len(within) + 1 :]
    return plain
