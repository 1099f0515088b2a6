"""Endless context in constant memory for any pretrained Hugging Face language model."""

__version__ = "0.1.0"  # before the imports: what a session file says of its writer

import cometlm.compat  # noqa: F401 (refuses old versions of torch and transformers, before all else)
from cometlm.checkpoints.merge import merge_lora
from cometlm.config import CometConfig, CometModelConfig
from cometlm.core.attach import attach, detach
from cometlm.core.cache import CometCache
from cometlm.core.causal_lm import CometForCausalLM
from cometlm.core.model import CometModel
from cometlm.model_loader import load
from cometlm.session.session import Session
from cometlm.train.trainable import lora_config, parameter_groups

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
