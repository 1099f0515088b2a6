"""Tiny models of a backbone with a name, for tests of what checkpoints keep."""

import peft
import torch
from transformers import AutoModelForCausalLM

import cometlm
from tests.tiny import random_ids, scramble

SIZES = {"chunk_size": 12, "readout_tokens": 3, "stride": 4, "capacity": 5, "rank": 2}
IDS = random_ids(40)[None]


def attached(folder, **sizes):
    backbone = AutoModelForCausalLM.from_pretrained(folder).eval()
    model = cometlm.attach(backbone, **{**SIZES, **sizes})
    torch.manual_seed(5)
    scramble(model.model.comet, 0.5)
    return model


def with_lora(model, targets, **options):
    model.add_adapter(peft.LoraConfig(r=2, target_modules=targets, lora_alpha=4, **options))
    torch.manual_seed(8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(IDS.to(model.device)).logits
