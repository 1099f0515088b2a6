"""Every family with a row: the fast path equals the naive reference, logits and gradients."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import cometlm
from cometlm.backbones.families import FAMILIES as SUPPORTED
from cometlm.backbones.rotary import RotaryTables
from cometlm.backbones.taking_apart import take_apart
from cometlm.core.reference import reference_logits
from tests.tiny import FAMILIES, error, random_ids, tiny_backbone, tiny_comet

family = pytest.mark.parametrize("family", sorted(FAMILIES))
SWITCHES = [
    {},
    {"global_memory": False},
    {"temporary_memory": False},
    {"gate": False},
    {"capacity": 50},
]


def test_every_family_is_tested():
    assert set(FAMILIES) == set(SUPPORTED)


@family
@pytest.mark.parametrize("sizes", SWITCHES, ids=str)
def test_logits_and_gradients(family, sizes):
    model = tiny_comet(family, **sizes)
    ids = random_ids(43)
    weights = torch.randn(43, 96, dtype=torch.float64)

    fast = model(ids[None]).logits[0]
    (fast * weights).sum().backward()
    ours = {name: p.grad for name, p in model.named_parameters()}

    model.zero_grad()
    naive = reference_logits(model, ids)
    (naive * weights).sum().backward()
    theirs = {name: p.grad for name, p in model.named_parameters()}

    # Norms and rotary angles of transformers are float32 even in a float64 model.
    assert error(fast, naive) < 1e-6
    for name, grad in theirs.items():
        if grad is None or not grad.abs().any():
            assert ours[name] is None or not ours[name].abs().any(), name
        else:
            assert error(ours[name], grad) < 1e-5, name


@family
def test_a_row_makes_what_capture_takes(family):
    """A row only makes slots' keys and values faster, logits and gradients."""
    fast = tiny_comet(family)
    slow = tiny_comet(family)
    parts = take_apart(slow._backbone, capture=True)
    for cell, call in zip(slow.model.cells, parts.calls, strict=True):
        cell.call, cell.family = call, None
    slow.model._tables = RotaryTables(parts.rotations)
    ids, weights = random_ids(43)[None], torch.randn(43, 96, dtype=torch.float64)
    found = []
    for model in (fast, slow):
        logits = model(ids).logits[0]
        (logits * weights).sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        found.append((logits, grads))
    assert not any(cell.packs for cell in slow.model.cells)
    assert error(found[0][0], found[1][0]) < 1e-12
    for name, grad in found[1][1].items():
        assert (grad is None) == (found[0][1][name] is None), name
        assert grad is None or error(found[0][1][name], grad) < 1e-6, name


@family
def test_memory_off_is_the_backbone(family):
    backbone = tiny_backbone(family)
    ids = torch.stack([random_ids(40), random_ids(40, seed=1)])
    with torch.no_grad():
        want = backbone(ids).logits
        model = cometlm.attach(backbone, chunk_size=64, global_memory=False, temporary_memory=False)
        assert error(model(ids).logits, want) < 1e-6


@family
def test_detach_gives_the_backbone_back(family):
    backbone = tiny_backbone(family)
    backbone.model.layers[1].requires_grad_(False)
    ids = random_ids(30)[None]
    flags = {name: p.requires_grad for name, p in backbone.named_parameters()}
    implementation = backbone.config._attn_implementation
    with torch.no_grad():
        before = backbone(ids).logits
        model = cometlm.attach(backbone, chunk_size=12, readout_tokens=3, stride=4, capacity=5)
        model(ids)
        model.requires_grad_(False)
        returned = cometlm.detach(model)
        after = returned(ids).logits
    assert returned is backbone
    assert torch.equal(before, after)
    assert backbone.config._attn_implementation == implementation
    assert {name: p.requires_grad for name, p in backbone.named_parameters()} == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.modules())
    with pytest.raises(ValueError, match="detached"):
        cometlm.detach(model)
    with pytest.raises(ValueError, match="detached"):
        model(ids)


def test_attached_backbone_still_runs_alone():
    backbone = tiny_backbone("qwen3")
    ids = random_ids(30)[None]
    with torch.no_grad():
        before = backbone(ids).logits
        cometlm.attach(backbone, chunk_size=12, readout_tokens=3, stride=4, capacity=5)
        assert error(backbone(ids).logits, before) < 1e-12


@pytest.mark.parametrize("kind", ["longrope", "dynamic", "yarn", "llama3"])
def test_length_dependent_rotary_does_not_depend_on_cuts(kind):
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0, 2.5, 2.0, 1.5]}
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind != "dynamic":
        rope["original_max_position_embeddings"] = 20
    backbone = tiny_backbone("llama", rope_parameters=rope)
    sizes = {"chunk_size": 20, "readout_tokens": 4, "stride": 4, "capacity": 8}
    model = cometlm.attach(backbone, **sizes)
    ids = random_ids(50)
    with torch.no_grad():
        whole = model(ids[None]).logits[0]
        assert error(whole, reference_logits(model, ids)) < 1e-6
        cache, parts = None, []
        for piece in ids.split(3):
            out = model(piece[None], past_key_values=cache)
            cache = out.past_key_values
            parts.append(out.logits[0])
    assert error(torch.cat(parts), whole) < 1e-6


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("mpt", r"layer 0 \(MptBlock\) is given 'position_bias'"),
        ("t5", "t5 is an encoder-decoder"),
    ],
)
def test_unsupported_backbones_say_why(model_type, said):
    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
             "intermediate_size": 32, "moe_intermediate_size": 8, "num_experts": 2,
             "num_experts_per_tok": 1, "shared_expert_intermediate_size": 8, "d_model": 32,
             "d_kv": 8, "d_ff": 32, "num_heads": 2, "n_embd": 32, "n_layer": 1, "n_head": 2,
             "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
             "linear_value_head_dim": 8}  # fmt: skip
    config = AutoConfig.for_model(model_type, **small)
    if model_type == "t5":
        from transformers import AutoModelForSeq2SeqLM

        backbone = AutoModelForSeq2SeqLM.from_config(config)
    else:
        backbone = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=said):
        cometlm.attach(backbone)
