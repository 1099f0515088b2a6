"""The Hugging Face side of the configuration: a mutable config that carries the frozen one."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from cometlm.config import CometConfig


class CometModelConfig(PreTrainedConfig):
    """Configuration of a backbone with CoMeT attached.

    It has no `max_position_embeddings`: positions restart at every chunk, so no input is too long.

    Attributes:
        text_config: the backbone's own config.
        backbone: name or path that the backbone was loaded from.
        comet: `CometConfig` as a dict; `comet_config` is the frozen object.
        suppressed_tokens: vocabulary ids that are never generated (the reserved rows of published
            checkpoints).
    """

    model_type = "cometlm"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012 (transformers' own form)

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    backbone: str = ""
    comet: dict[str, Any] | None = None
    suppressed_tokens: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.text_config, dict):
            values = dict(self.text_config)
            self.text_config = AutoConfig.for_model(values.pop("model_type"), **values)
        text = self.text_config
        if text is not None:
            for name in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"):
                if kwargs.get(name) is None and getattr(text, name, None) is not None:
                    kwargs.pop(name, None)
                    setattr(self, name, getattr(text, name))
        super().__post_init__(**kwargs)

    @property
    def comet_config(self) -> CometConfig:
        """The frozen sizes and switches."""
        return CometConfig.from_dict(self.comet or {})

    @property
    def vocab_size(self) -> int:
        """Rows of the backbone's embedding."""
        return int(self.text_config.vocab_size)  # type: ignore[union-attr]

    @property
    def hidden_size(self) -> int:
        """Width D of the backbone."""
        return int(self.text_config.hidden_size)  # type: ignore[union-attr]

    @property
    def num_hidden_layers(self) -> int:
        """Layers L of the backbone."""
        return int(self.text_config.num_hidden_layers)  # type: ignore[union-attr]
