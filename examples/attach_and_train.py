"""Give a backbone a memory, and train it for a few steps with transformers' own `Trainer`.

    python examples/attach_and_train.py --steps 20

A new memory is untrained: text behind the first chunk is read badly. Expect the loss to fall within
20 steps (two minutes on two cores); to remember takes many more (docs/training.md).
"""

import argparse
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

import cometlm

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="smollm2")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--out", default="out/attached")
options = parser.parse_args()
sizes = {"chunk_size": 64, "readout_tokens": 8, "stride": 8, "capacity": 16}

loaded, tokenizer = cometlm.load(options.model, seed=0, dtype=torch.float32, **sizes)
backbone = cometlm.detach(loaded)  # or any: AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")
model = cometlm.attach(backbone, **sizes)
model.requires_grad_(False)
model.model.comet.requires_grad_(True)  # the memory alone

ids = tokenizer(Path(argparse.__file__).read_text(encoding="utf-8"))["input_ids"]
pieces = [ids[at : at + 256] for at in range(0, 4096, 256)]  # four chunks each
settings = {"logging_steps": 5, "per_device_train_batch_size": 2, "report_to": "none"}
arguments = TrainingArguments(options.out, max_steps=options.steps, learning_rate=3e-3, **settings)
samples = [{"input_ids": piece, "labels": piece} for piece in pieces]
Trainer(model, arguments, train_dataset=samples).train()
model.save_pretrained(options.out)  # the memory alone: a few megabytes
