"""The vectors of SPEC §9: logits, loss and gradients of published naming."""

import random

import pytest
import torch

from cometlm.core.reference import reference_generate, reference_logits
from tests.tiny import GOLDEN, error, load_golden

golden = pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)


@golden
def test_logits_and_loss(path):
    model, want, _ = load_golden(path)
    ids = want["input_ids"][None]
    with torch.no_grad():
        out = model(ids, labels=ids, logits_to_keep=0)
    assert error(out.logits[0], want["logits"]) < 5e-5
    assert abs(float(out.loss) - float(want["loss"])) < 5e-5


@golden
def test_gradients(path):
    model, want, config = load_golden(path)
    ids = want["input_ids"][None]
    model(ids, labels=ids).loss.backward()
    ours = published_gradients(model, config)
    names = {name.removeprefix("grad.") for name in want if name.startswith("grad.")}
    assert {name for name, grad in ours.items() if grad is not None} == names
    for name in names:
        assert error(ours[name], want[f"grad.{name}"]) < 1e-4, name


@golden
def test_reference(path):
    model, want, _ = load_golden(path)
    with torch.no_grad():
        assert error(reference_logits(model, want["input_ids"]), want["logits"]) < 5e-5


@pytest.mark.parametrize(
    "path",
    [p for p in GOLDEN if p.stem not in ("global_only", "temporary_only")],
    ids=lambda path: path.stem,
)
def test_reference_generates(path):
    model, want, _ = load_golden(path)
    ids = want["generated_ids"].tolist()
    with torch.no_grad():
        assert reference_generate(model, want["input_ids"], len(ids)) == ids


@golden
@pytest.mark.parametrize("seed", range(4))
def test_random_pieces(path, seed):
    model, want, _ = load_golden(path)
    ids, cache, logits = want["input_ids"][None], None, []
    rng = random.Random(seed)
    with torch.no_grad():
        while ids.shape[1]:
            size = rng.choice([1, 2, 5, 16, 17, 40])
            out = model(ids[:, :size], past_key_values=cache)
            logits.append(out.logits)
            cache, ids = out.past_key_values, ids[:, size:]
    assert error(torch.cat(logits, 1)[0], want["logits"]) < 5e-5


@golden
@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_batch(path, side):
    model, want, _ = load_golden(path)
    ids = want["input_ids"]
    lengths = [len(ids), len(ids) - 3, 1, len(ids) // 2]
    batch = torch.zeros(len(lengths), len(ids), dtype=torch.long)
    mask = torch.zeros_like(batch)
    for b, n in enumerate(lengths):
        place = slice(len(ids) - n, None) if side == "left" else slice(0, n)
        batch[b, place], mask[b, place] = ids[:n], 1
    with torch.no_grad():
        logits = model(batch, attention_mask=mask).logits
    for b, n in enumerate(lengths):
        assert error(logits[b][mask[b].bool()], want["logits"][:n]) < 5e-5


def published_gradients(model, config):
    """Gradients of a model under the published names."""
    grads = {}
    for name, parameter in model.named_parameters():
        name = name.replace("model.cells.", "model.layers.").replace(".layer.", ".inner_layer.")
        if not name.startswith("model.comet."):
            grads[name] = parameter.grad
    embedding = model.model.embed_tokens.weight.grad.clone()
    comet = model.model.comet
    if comet.readout is not None and comet.readout.grad is not None:
        embedding[config["readout_token_ids"]] += comet.readout.grad
    if comet.compression is not None and comet.compression.grad is not None:
        embedding[config["compression_token_id"]] += comet.compression.grad[0]
    grads["model.embed_tokens.weight"] = embedding
    for i, layer in enumerate(comet.layers):
        prefix = f"model.layers.{i}."
        if layer.global_memory is not None:
            memory, to = layer.global_memory, prefix + "global_memory_net."
            grads[to + "norm.weight"] = memory.norm.weight.grad
            grads[to + "g_proj.weight"] = memory.gate.grad
            grads[to + "o_proj.down_proj.weight"] = memory.adapter.down.grad
            grads[to + "o_proj.up_proj.weight"] = memory.adapter.up.grad
        if layer.temporary_memory is not None:
            memory, to = layer.temporary_memory, prefix + "temp_memory_net."
            grads[to + "0.weight"] = memory.norm.weight.grad
            grads[to + "1.down_proj.weight"] = memory.adapter.down.grad
            grads[to + "1.up_proj.weight"] = memory.adapter.up.grad
    return grads
