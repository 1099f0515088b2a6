"""Endless context in constant memory for any pretrained Hugging Face language model."""

from cometlm.cache import CometCache
from cometlm.config import CometConfig
from cometlm.loading import load
from cometlm.model import CometForCausalLM, CometModel, attach, detach
from cometlm.model_config import CometModelConfig
from cometlm.session import Session

__version__ = "0.1.0"

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
]
