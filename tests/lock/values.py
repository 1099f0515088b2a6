"""The numbers that are locked: of the golden models and a tiny one of each family, in float64."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

import cometlm
from cometlm.session.file import read_document
from tests.tiny import FAMILIES, GOLDEN, batch_of, load_golden, random_ids, tiny_comet

FOLDER = Path(__file__).parent
VALUES = FOLDER / "values.safetensors"
SESSION = FOLDER / "session.comet"
MERGED_SESSION = FOLDER / "session-merged.comet"
CHECKPOINT = FOLDER / "checkpoint"
EXPECTED = FOLDER / "expected.safetensors"
SHIPPED = FOLDER / "smollm2.json"
CASES = [*(f"golden/{path.stem}" for path in GOLDEN), *(f"family/{name}" for name in FAMILIES)]
TEXT = random_ids(77, seed=5)
_SAMPLES = 8


def computed(case: str) -> dict[str, Tensor]:
    """Loss, logits, gradients and greedy ids of one case, by name."""
    kind, _, name = case.partition("/")
    if kind == "golden":
        path = next(path for path in GOLDEN if path.stem == name)
        model, tensors, _ = load_golden(path)
        model, ids = model.double(), tensors["input_ids"][None]
        prompt = ids[:, :9]
    else:
        model, ids = tiny_comet(name), batch_of(2, 40)
        prompt = ids[:1, :17]
    found = {"ids": model.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)}
    found["logits"] = model(ids).logits[:, ::5].detach()
    found["loss"] = (loss := model.train()(ids, labels=ids).loss).detach()
    loss.backward()
    for parameter, value in sorted(model.named_parameters()):
        if value.grad is not None:
            found[f"grad.{parameter}"] = sampled(value.grad)
    if kind == "family":
        mask = torch.ones(2, 40, dtype=torch.long)
        mask[1, :13] = 0
        ragged = model.eval()(ids, attention_mask=mask).logits
        found["ragged"] = ragged[mask.bool()][::5].detach()
    return found


def sampled(gradient: Tensor) -> Tensor:
    """A gradient's norm, and some of its numbers, evenly spaced."""
    flat = gradient.flatten()
    return torch.cat([flat.norm()[None], flat[:: max(1, flat.numel() // _SAMPLES)]])


KEYS = ("48213", "90657", "17342")
_HAY = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"


def answers(dtype: torch.dtype) -> dict[str, object]:
    """What the shipped SmolLM2 answers after some 1,300 tokens, and what its sessions belong to."""
    model, tokenizer = cometlm.load("smollm2-passkey", device="cpu", dtype=dtype)
    said = []
    for place, key in enumerate(KEYS):
        session = cometlm.Session(model, tokenizer)
        before = 5 + 18 * place
        told = f"The pass key is {key}. Remember it. {key} is the pass key.\n"
        session.read(_HAY * before + told + _HAY * (60 - before))
        answer = session.ask("What is the pass key?", max_new_tokens=8, do_sample=False)
        said.append("".join(answer).strip())
    with tempfile.TemporaryDirectory() as folder:
        session.save(Path(folder) / "s")
        document = read_document(Path(folder) / "s")
    return {"answers": said, "made_by": document["made_by"], "model": document["model"]}
