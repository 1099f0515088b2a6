"""peft's adapters on a model: the switches that transformers gives its models, for any peft.

Those of transformers 5.24 require peft 0.22; these do the same with older ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

if TYPE_CHECKING:
    from peft import PeftConfig


class AdapterMixin:
    """Adapters that stand beside the weights they adapt; none of this is there without peft."""

    peft_config: dict[str, Any]
    _hf_peft_config_loaded: bool

    def add_adapter(self, adapter_config: PeftConfig, adapter_name: str | None = None) -> None:
        """Add a fresh adapter and make it the active one.

        Args:
            adapter_name: default "default".

        Raises:
            ValueError: there is one of that name.
            ImportError: peft is not installed.
        """
        from peft import inject_adapter_in_model

        name = adapter_name or "default"
        if has_adapter(self) and name in self.peft_config:
            raise ValueError(f"adapter_name={name!r} is an adapter that the model has already")
        adapter_config.base_model_name_or_path = self.__dict__.get("name_or_path")
        inject_adapter_in_model(adapter_config, cast("nn.Module", self), name)
        self._hf_peft_config_loaded = True
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
        """Names of the active adapters.

        Raises:
            ValueError: the model has none.
        """
        self._check_adapters()
        active = next(self._adapted()).active_adapter
        return [active] if isinstance(active, str) else list(active)

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
        own: dict[str, Tensor] = get_peft_model_state_dict(
            self, state_dict=state_dict, adapter_name=name
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


def has_adapter(model: object) -> bool:
    """Whether a model has an adapter of peft's beside its weights."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))
