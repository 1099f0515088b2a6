"""peft's tests of decoders, for LoRA and IA3; becomes `conftest.py` of its suite."""

import re
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import torch
from peft.utils import constants
from transformers import LlamaConfig, LlamaForCausalLM

import cometlm
from cometlm.core.training_plan import TrainingPlan

HERE = Path(__file__).parent
MODEL = str(HERE / "model")

# The suite imports a pipeline of diffusers, which these tests do not use.
diffusers = types.ModuleType("diffusers")
diffusers.__spec__ = ModuleSpec("diffusers", None)
diffusers.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
sys.modules["diffusers"] = diffusers

# Which modules are adapted where a config names none.
constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["cometlm"] = ["q_proj", "v_proj"]
IA3 = ["k_proj", "v_proj", "down_proj"]
constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING["cometlm"] = IA3
constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING["cometlm"] = ["down_proj"]


def make_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1100,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=48,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    sizes = {"chunk_size": 16, "readout_tokens": 4, "stride": 4, "capacity": 8, "rank": 2}
    cometlm.attach(LlamaForCausalLM(config), **sizes).save_pretrained(MODEL, backbone=True)


def rewrite(name, *changes):
    """Change a file of the suite, from what it was before any change."""
    file, before = HERE / name, HERE / f"{name}.before"
    if not before.exists():
        file.rename(before)
    text = before.read_text(encoding="utf-8")
    for pattern, new in changes:
        text, count = re.subn(pattern, new, text)
        assert count, f"{name} has no {pattern}"
    file.write_text(text, encoding="utf-8")


make_model()
rewrite(
    "test_decoder_models.py",
    # One model, and the kinds of adapters that a checkpoint holds.
    (
        r"\n\ndef _skip_if_not_conv1d_supported",
        f"\n\nPEFT_DECODER_MODELS_TO_TEST = [{MODEL!r}]\n"
        "ALL_CONFIGS = [one for one in ALL_CONFIGS if one[0] in (LoraConfig, IA3Config)]\n"
        r"\g<0>",
    ),
    (r"\[1, 0, 1\]", "[0, 1, 1]"),  # padding has no holes here
)
rewrite("testing_common.py", (r"\[1, 0, 1\]", "[0, 1, 1]"))

# Adapters alone are trained, which a model with memory has to be told.
load = cometlm.CometForCausalLM.from_pretrained.__func__


def frozen(cls, *args, **options):
    model = load(cls, *args, **options)
    model.training_plan = TrainingPlan(memory_frozen=True)
    return model


cometlm.CometForCausalLM.from_pretrained = classmethod(frozen)


def pytest_collection_modifyitems(items):
    """Leave out tests of one model of the hub."""
    items[:] = [
        item
        for item in items
        if hasattr(item, "callspec") and item.callspec.params.get("model_id") == MODEL
    ]
