"""Go on from several prompts at once with transformers' own `generate`.

    python examples/generate_batch.py

Rows may differ in length, and one may be longer than a chunk: each folds into its own memory.
Expect one line for each prompt.
"""

import argparse

import cometlm

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="smollm2")
options = parser.parse_args()

model, tokenizer = cometlm.load(options.model)
prompts = [
    "The capital of France is",
    "In the morning the ship left the harbour. " * 50 + "In the evening",
]
tokenizer.padding_side = "left"
batch = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
out = model.generate(**batch, max_new_tokens=12, do_sample=False)
written = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
for prompt, text in zip(prompts, written, strict=True):
    print(f"…{prompt[-30:]}|{text!r}")
