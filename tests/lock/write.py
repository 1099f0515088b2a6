"""Writes the lock's files: `python -m tests.lock.write COMMIT`."""

from __future__ import annotations

import json
import sys

import peft
import torch
from safetensors.torch import save_file

import cometlm
from tests.lock.values import (
    CASES,
    CHECKPOINT,
    EXPECTED,
    MERGED_SESSION,
    SESSION,
    SHIPPED,
    TEXT,
    VALUES,
    answers,
    computed,
)
from tests.tiny import random_ids, tiny_comet


def main() -> None:
    """Write all files."""
    about = {"commit": sys.argv[1], "cometlm": cometlm.__version__, "torch": torch.__version__}
    values = {f"{case}|{k}": v.contiguous() for case in CASES for k, v in computed(case).items()}
    save_file(values, VALUES, about)
    model = tiny_comet("llama").float()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_alpha=4))
    torch.manual_seed(8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.eval().save_pretrained(CHECKPOINT, backbone=True)
    again = cometlm.CometForCausalLM.from_pretrained(CHECKPOINT)
    with torch.no_grad():
        logits = again(random_ids(40, seed=6)[None]).logits
    written = {"logits": logits}
    for path in (SESSION, MERGED_SESSION):
        session = again.session()
        session.read(TEXT)
        session.save(path)
        written[path.name] = torch.tensor(session.continuation(30))
        cometlm.merge_lora(again)
    save_file(written, EXPECTED, about)
    shipped = {name: answers(getattr(torch, name)) for name in ("float32", "bfloat16")}
    SHIPPED.write_text(json.dumps(shipped, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
