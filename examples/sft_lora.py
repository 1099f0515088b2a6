"""Fine-tune memory and LoRA together with trl's unmodified `SFTTrainer`.

    python examples/sft_lora.py --steps 20

Each sample is longer than a chunk, so its answer has to come through the memory. Expect the loss to
fall; 20 steps teach the form of an answer, not yet to remember. trl cuts samples at 1,024 tokens
without `max_length=None`.
"""

import argparse

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import cometlm

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="smollm2")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--out", default="out/sft")
options = parser.parse_args()
sizes = {"chunk_size": 64, "readout_tokens": 8, "stride": 8, "capacity": 16}

model, tokenizer = cometlm.load(options.model, seed=0, dtype=torch.float32, **sizes)
story = "The ship carried {}. " + "It left the harbour in the rain, and nobody looked back. " * 8
cargo = ["salt", "iron", "wool", "glass", "wine", "tea", "coal", "rope"]
rows = [{"prompt": story.format(one) + "Its cargo was", "completion": f" {one}."} for one in cargo]
settings = {"logging_steps": 5, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
trainer = SFTTrainer(
    model,
    args=SFTConfig(options.out, max_steps=options.steps, max_length=None, bf16=False, **settings),
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
    peft_config=cometlm.lora_config(r=8),
)
trainer.train()
trainer.model.merge_and_unload().save_pretrained(options.out, backbone=True)  # LoRA merged
tokenizer.save_pretrained(options.out)  # cometlm.load(options.out) reads it
