"""A vocabulary that gets another size, before attaching and after: both parts, checkpoints."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import cometlm
from cometlm import CometForCausalLM
from cometlm.checkpoints.weights import saved_names
from tests.checkpoints import SIZES
from tests.tiny import error, random_ids, refused, tiny_backbone

IDS = torch.cat([random_ids(30), torch.tensor([97, 96])])[None]  # the last two are new


def backbone(folder, tie, **changes):
    tiny_backbone("llama", tie_word_embeddings=tie, **changes).float().save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("tie", [False, True], ids=["two weights", "tied"])
@torch.no_grad()
def test_a_model_is_resized_as_its_backbone_would_be(tmp_path, tie):
    want = backbone(tmp_path, tie)
    before = want.lm_head.weight.clone()
    torch.manual_seed(1)
    want.resize_token_embeddings(98)
    model = cometlm.attach(backbone(tmp_path, tie), **SIZES)
    torch.manual_seed(1)
    assert model.resize_token_embeddings(98) is model.get_input_embeddings()
    head = model.get_output_embeddings()
    assert (head.weight is model.get_input_embeddings().weight) == tie
    assert model.config.vocab_size == head.weight.shape[0] == head.out_features == 98
    assert torch.equal(head.weight[:96], before)
    assert model(IDS, labels=IDS, logits_to_keep=0).logits.shape == (1, 32, 98)
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape == (1, 35)
    assert error(cometlm.detach(model)(IDS).logits, want(IDS).logits) < 1e-6


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("tie", [False, True], ids=["two weights", "tied"])
@torch.no_grad()
def test_a_checkpoint_then_holds_the_backbone(tmp_path, tie, when):
    plain = backbone(tmp_path / "tiny", tie)
    if when == "before":
        plain.resize_token_embeddings(98)
    model = cometlm.attach(plain, **SIZES)
    if when == "after":
        model.resize_token_embeddings(98)
    model.save_pretrained(tmp_path / "checkpoint")
    loaded = CometForCausalLM.from_pretrained(tmp_path / "checkpoint")
    assert loaded.config.vocab_size == 98
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    again = tmp_path / "again"
    loaded.save_pretrained(again)  # names the backbone that the first one holds
    assert not (again / "backbone").exists()
    assert torch.equal(CometForCausalLM.from_pretrained(again)(IDS).logits, model(IDS).logits)


def test_what_was_trained_after_resizing_is_saved(tmp_path):
    model = cometlm.attach(backbone(tmp_path / "tiny", False), **SIZES).train()
    model.resize_token_embeddings(98)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path / "checkpoint")
    loaded = CometForCausalLM.from_pretrained(tmp_path / "checkpoint")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_gathered_weights_then_hold_the_backbone_too(tmp_path):
    model = cometlm.attach(backbone(tmp_path / "tiny", False), **SIZES)
    assert "lm_head.weight" not in saved_names(model)
    assert "lm_head.weight" in saved_names(model, backbone=True)
    model.resize_token_embeddings(98)
    weights = {name: w for name, w in model.state_dict().items() if name in saved_names(model)}
    model.save_pretrained(tmp_path / "checkpoint", state_dict=weights)
    loaded = CometForCausalLM.from_pretrained(tmp_path / "checkpoint")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_a_named_backbone_of_another_size_is_refused(tmp_path):
    plain = backbone(tmp_path / "tiny", False)
    model = cometlm.attach(backbone(tmp_path / "tiny", False), **SIZES)
    model.save_pretrained(tmp_path / "checkpoint")
    backbone(tmp_path / "tiny", False, vocab_size=99)
    with refused("saved beside a backbone with a vocabulary of 96, but"):
        CometForCausalLM.from_pretrained(tmp_path / "checkpoint")
    with refused("saved beside a backbone with a vocabulary of 96, but"):
        cometlm.load(str(tmp_path / "checkpoint"), device="cpu")
    CometForCausalLM.from_pretrained(tmp_path / "checkpoint", backbone=plain)


def test_a_backbone_that_is_resized_by_itself_is_refused(tmp_path):
    plain = backbone(tmp_path, False)
    model = cometlm.attach(plain, **SIZES)
    plain.resize_token_embeddings(98)
    with refused("resized from 96 to 98 while it is attached"):
        model(IDS)


def test_replaced_embeddings_are_the_backbones_too(tmp_path):
    plain = backbone(tmp_path / "tiny", False)
    model = cometlm.attach(plain, **SIZES)
    table, head = torch.nn.Embedding(96, 32), torch.nn.Linear(32, 96, bias=False)
    model.set_input_embeddings(table)
    model.set_output_embeddings(head)
    want = model(IDS[:, :30]).logits
    model.save_pretrained(tmp_path / "checkpoint", backbone=True)
    loaded = CometForCausalLM.from_pretrained(tmp_path / "checkpoint")
    assert torch.equal(loaded(IDS[:, :30]).logits, want)
    cometlm.detach(model)
    assert plain.get_input_embeddings() is table
    assert plain.get_output_embeddings() is head
