"""LoRA adapters in checkpoints, and merged into the weights that they adapt."""

import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import cometlm
from cometlm import CometForCausalLM
from cometlm.checkpoints import lora as lora_file
from tests.checkpoints import SIZES, attached, logits, with_lora
from tests.tiny import error, random_ids, tiny_backbone


@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj", "v_proj"],
        ["k_proj", "o_proj", "gate_proj"],
        ["q_proj", "down_proj"],  # the name of a projection in the memory, too
        "all-linear",
    ],
    ids=str,
)
def test_lora_adapters_are_saved_and_loaded(named, tmp_path, targets):
    model = attached(named)
    plain = logits(model)
    with_lora(model, targets)
    want = logits(model)
    assert not torch.equal(want, plain)
    model.save_pretrained(tmp_path / "checkpoint")
    files = {path.name for path in (tmp_path / "checkpoint" / "lora").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    for loader in (CometForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        assert torch.equal(logits(loader(str(tmp_path / "checkpoint"))), want)


def test_lora_is_merged_on_loading_unless_it_is_to_be_trained(named, tmp_path):
    model = with_lora(attached(named), ["q_proj", "down_proj"])
    assert not cometlm.merge_lora(attached(named))
    model.save_pretrained(tmp_path / "adapter")
    apart, _ = cometlm.load(
        str(tmp_path / "adapter"), device="cpu", dtype=torch.float64, merge=False
    )
    want = logits(apart)
    assert error(logits(model), want) < 1e-5
    apart.save_pretrained(tmp_path / "again")
    merged, _ = cometlm.load(str(tmp_path / "adapter"), device="cpu", dtype=torch.float64)
    assert not any("lora_" in name for name in merged.state_dict())
    assert error(logits(merged), want) < 1e-12
    with pytest.raises(ValueError, match="save with backbone=True, or load with merge=False"):
        merged.save_pretrained(tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    merged.save_pretrained(tmp_path / "whole", backbone=True)
    whole = CometForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float64)
    assert not whole.merged
    assert error(logits(whole), want) < 1e-12


def loaded(folder, dtype=torch.float32, **options):
    return cometlm.load(str(folder), device="cpu", dtype=dtype, **options)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 3}}])
def test_an_adapter_is_merged_from_its_file_as_peft_merges_it(named, tmp_path, dtype, options):
    with_lora(attached(named), ["q_proj", "down_proj"], **options).save_pretrained(tmp_path)
    ours, theirs = loaded(tmp_path, dtype), loaded(tmp_path, dtype, merge=False)
    assert cometlm.merge_lora(theirs)
    assert ours.merged
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other), name
    session = theirs.session()
    session.read(random_ids(40))
    session.save(tmp_path / "s")
    assert cometlm.Session.load(tmp_path / "s", ours).continuation(3) == session.continuation(3)


def test_reading_needs_no_peft(named, tmp_path, monkeypatch):
    with_lora(attached(named), ["q_proj"]).save_pretrained(tmp_path)
    want = logits(loaded(tmp_path))
    monkeypatch.setitem(sys.modules, "peft", None)
    assert torch.equal(logits(loaded(tmp_path)), want)
    with pytest.raises(ValueError, match="pip install peft"):
        loaded(tmp_path, merge=False)
    assert not (CometForCausalLM.from_pretrained(tmp_path, merge=True)).training


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"alpha_pattern": {"q_proj": 7}},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "pissa"},
    ],
    ids=str,
)
def test_an_adapter_that_is_more_than_two_matrices_is_merged_by_peft(named, tmp_path, options):
    with_lora(attached(named), ["q_proj"], **options).save_pretrained(tmp_path)
    # peft makes the last two in float32 only; merged as plain ones they would be off by 1.
    dtype, bound = torch.float64, 1e-12
    if "init_lora_weights" in options:
        dtype, bound = torch.float32, 1e-4
    apart = loaded(tmp_path, dtype, merge=False)
    merged = loaded(tmp_path, dtype)
    assert merged.merged
    assert error(logits(merged), logits(apart)) < bound


@pytest.mark.parametrize("merge", [True, False])
def test_an_adapter_of_another_model_is_refused(named, tmp_path, merge):
    with_lora(attached(named), ["q_proj"]).save_pretrained(tmp_path)
    file = tmp_path / "lora" / "adapter_model.safetensors"
    weights = {name.replace("q_proj", "x_proj"): w for name, w in load_file(file).items()}
    save_file(weights, file)
    with pytest.raises(ValueError, match=r"lora.*does not fit this model.*x_proj"):
        loaded(tmp_path, merge=merge)


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
@pytest.mark.parametrize("merge", [True, False])
def test_a_matrix_of_another_shape_is_refused_and_changes_nothing(named, tmp_path, part, merge):
    with_lora(attached(named), ["q_proj"]).save_pretrained(tmp_path)
    file = tmp_path / "lora" / "adapter_model.safetensors"
    weights = load_file(file)
    name = [name for name in weights if part in name][-1]
    weights[name] = torch.randn(7, 7)
    save_file(weights, file)
    backbone = AutoModelForCausalLM.from_pretrained(named).eval()
    before = {name: p.clone() for name, p in backbone.named_parameters()}
    with pytest.raises((ValueError, RuntimeError), match="7, 7"):
        CometForCausalLM.from_pretrained(tmp_path, backbone=backbone, merge=merge)
    if merge:
        assert all(torch.equal(before[name], p) for name, p in backbone.named_parameters())


def test_switched_off_and_on_again_it_is_the_same(named):
    model = with_lora(attached(named), ["q_proj"], modules_to_save=["norm"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(1.0)
    want = logits(model)
    model.disable_adapters()
    assert not torch.equal(logits(model), want)
    model.enable_adapters()
    assert torch.equal(logits(model), want)


def test_a_damaged_adapter_is_named(named, tmp_path):
    with_lora(attached(named), ["q_proj"]).save_pretrained(tmp_path)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        file = tmp_path / "lora" / name
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=name):
            loaded(tmp_path)
        file.write_bytes(whole)


def test_a_backbone_is_saved_without_its_adapter(named, tmp_path):
    """Which is saved beside it; after a merge, a new one."""
    model = with_lora(attached(named), ["q_proj", "down_proj"])
    for step in ("adapter", "another"):
        want = logits(model)
        model.save_pretrained(tmp_path / step, backbone=True)
        again = CometForCausalLM.from_pretrained(tmp_path / step)
        assert error(logits(again), want) < 1e-6
        assert cometlm.merge_lora(again)
        assert error(logits(again), want) < 1e-5
        model = with_lora(again, ["v_proj"])


def test_lora_on_tied_weights_or_switched_off_is_not_merged(named):
    backbone = tiny_backbone("llama", tie_word_embeddings=True)
    model = with_lora(cometlm.attach(backbone, **SIZES), ["embed_tokens"])
    assert not cometlm.merge_lora(model)
    off = with_lora(attached(named), ["q_proj"])
    off.disable_adapters()
    assert not cometlm.merge_lora(off)
    off.enable_adapters()
    assert cometlm.merge_lora(off)
    assert cometlm.attach(cometlm.detach(off), **SIZES).merged


def test_lora_stays_beside_weights_that_cannot_be_changed(named):
    model = with_lora(attached(named), ["q_proj"])
    layer = next(one for name, one in model.named_modules() if name.endswith("q_proj"))
    layer.base_layer = type("Packed", (torch.nn.Linear,), {})(1, 1)
    assert not cometlm.merge_lora(model)
    assert any("lora_" in name for name in model.state_dict())
    assert not model.merged


def test_an_adapter_that_stood_there_before_is_not_loaded(named, tmp_path):
    with_lora(attached(named), ["q_proj"]).save_pretrained(tmp_path)
    plain = attached(named)
    plain.save_pretrained(tmp_path)
    assert not (tmp_path / "lora").exists()
    assert torch.equal(logits(CometForCausalLM.from_pretrained(tmp_path)), logits(plain))


def test_lora_is_part_of_what_a_session_depends_on(named, tmp_path):
    model = with_lora(attached(named), ["q_proj", "v_proj"])
    session = model.session()
    session.read(random_ids(40))
    session.save(tmp_path / "s")
    with pytest.raises(ValueError, match="another model"):
        cometlm.Session.load(tmp_path / "s", attached(named))
    model.save_pretrained(tmp_path / "checkpoint")
    loaded = CometForCausalLM.from_pretrained(tmp_path / "checkpoint")
    again = cometlm.Session.load(tmp_path / "s", loaded)
    assert again.continuation(5) == session.continuation(5)


def test_a_session_is_not_bound_to_how_a_machine_rounds_when_it_merges(
    named, tmp_path, monkeypatch
):
    with_lora(attached(named), ["q_proj", "v_proj"]).save_pretrained(tmp_path / "adapter")

    def loaded():
        return cometlm.load(str(tmp_path / "adapter"), device="cpu", dtype=torch.float32)[0]

    model = loaded()
    session = model.session()
    session.read(random_ids(40))
    session.save(tmp_path / "s")
    exact = lora_file.merge_delta
    monkeypatch.setattr(
        lora_file,
        "merge_delta",
        lambda layer, delta, *parts: exact(layer, delta * (1 + 1e-6), *parts),
    )
    other = loaded()
    name = next(name for name, _ in other.named_parameters() if "v_proj" in name)
    assert not torch.equal(other.get_parameter(name), model.get_parameter(name))
    cometlm.Session.load(tmp_path / "s", other)
    with torch.no_grad():
        other.get_parameter(name).mul_(1.5)
    with pytest.raises(ValueError, match="another model"):
        cometlm.Session.load(tmp_path / "s", other)
