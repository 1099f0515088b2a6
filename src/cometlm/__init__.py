"""Endless context in constant memory for any pretrained Hugging Face language model."""

__version__ = "0.1.0"  # before the imports: what a session file says of its writer

import cometlm.compat  # noqa: F401 (refuses old versions of torch and transformers, before all else)
from cometlm.attachment import attach, detach
from cometlm.by_name import load
from cometlm.cache import CometCache
from cometlm.causal_lm import CometForCausalLM
from cometlm.config import CometConfig
from cometlm.merge import merge_lora
from cometlm.model import CometModel
from cometlm.model_config import CometModelConfig
from cometlm.session import Session
from cometlm.train.lora import lora_config, parameter_groups

__all__ = [
    "CometCache",
    "CometConfig",
    "CometForCausalLM",
    "CometModel",
    "CometModelConfig",
    "Session",
    "attach",
    "detach",
    "load",
    "lora_config",
    "merge_lora",
    "parameter_groups",
]
