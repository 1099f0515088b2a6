"""Attaching: refusals, modes, parameters, weights that are elsewhere or not tied."""

import warnings

import accelerate
import pytest
import torch
from transformers import AutoModelForCausalLM

import cometlm
from cometlm import CometConfig
from tests.tiny import SMALL, batch_of, error, random_ids, refused, tiny_backbone, tiny_comet


def test_attach_refuses_a_chunk_that_exceeds_the_positions():
    backbone = tiny_backbone("qwen3")
    before = backbone.config._attn_implementation
    with refused(
        "chunk_size=240 is too large for this backbone: global memory 3 + temporary memory 5 + "
        "chunk 240 + compression tokens 60 + readout 3 = 311 positions, but the backbone has "
        "max_position_embeddings=256"
    ):
        cometlm.attach(backbone, **{**SMALL, "chunk_size": 240})
    assert backbone.config._attn_implementation == before
    cometlm.attach(backbone, **SMALL)  # the refusal left the backbone as it was


def test_attach_refuses_unknown_fields_and_bad_sizes():
    backbone = tiny_backbone("qwen3")
    with refused("unknown CometConfig field 'chunk'; it has chunk_size, readout_tokens, stride"):
        cometlm.attach(backbone, chunk=12)
    with refused("stride must be at least 1, got 0"):
        cometlm.attach(backbone, CometConfig(**SMALL), stride=0)


def test_attach_twice():
    backbone = tiny_backbone("qwen3")
    model = cometlm.attach(backbone, **SMALL)
    with refused("Qwen3ForCausalLM already has a memory; detach() it first"):
        cometlm.attach(backbone, **SMALL)
    cometlm.detach(model)
    cometlm.attach(backbone, **SMALL)


def test_two_models_of_one_config_object():
    """What a config says of attention is what an attached model needs."""
    first = tiny_backbone("qwen3")
    model = cometlm.attach(first, **SMALL)
    second = type(first)(first.config)
    with refused("was made of the config object of a model that has a memory"):
        cometlm.attach(second, **SMALL)
    cometlm.detach(model)
    cometlm.attach(second, **SMALL)


def test_a_model_with_a_memory_gets_no_second_one():
    model = tiny_comet("qwen3")
    with refused("CometForCausalLM already has a memory; detach() it first"):
        cometlm.attach(model, **SMALL)
    model(random_ids(20)[None])  # the refusal left it as it was


def test_a_backbone_that_was_changed_is_its_own_only_copy(tmp_path):
    """Attached again, it must not be named instead of saved."""
    tiny_backbone("llama").save_pretrained(tmp_path / "named")
    model = cometlm.attach(AutoModelForCausalLM.from_pretrained(tmp_path / "named"), **SMALL)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model = cometlm.attach(cometlm.detach(model), **SMALL).eval()
    model.save_pretrained(tmp_path / "saved")
    ids = random_ids(20)[None]
    again = cometlm.CometForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_only_a_config_of_a_model_with_memory_makes_one():
    with refused("config must be a CometModelConfig, got Qwen3Config"):
        cometlm.CometForCausalLM(tiny_backbone("qwen3").config)


@pytest.mark.parametrize("training", [True, False])
def test_attach_keeps_the_mode(training):
    backbone = tiny_backbone("qwen3").train(training)
    model = cometlm.attach(backbone, **SMALL)
    assert {module.training for module in model.modules()} == {training}
    assert {module.training for module in cometlm.detach(model).modules()} == {training}


@pytest.mark.parametrize("frozen", ["all", "some", "none"])
def test_attach_keeps_what_requires_grad(frozen):
    backbone = tiny_backbone("qwen3")
    backbone.requires_grad_(frozen != "all")
    backbone.model.layers[1].requires_grad_(frozen == "none")
    before = {id(p): p.requires_grad for p in backbone.parameters()}
    model = cometlm.attach(backbone, **SMALL)
    new = [p for p in model.parameters() if id(p) not in before]
    assert {id(p): p.requires_grad for p in backbone.parameters()} == before
    assert {id(p) for p in model.parameters()} == {*before, *map(id, new)}
    assert {id(p) for p in new} == {id(p) for p in model.model.comet.parameters()}
    assert all(p.requires_grad for p in new)
    ids = random_ids(43)[None]
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in new)
    assert all((p.grad is not None) == before[id(p)] for p in backbone.parameters())


def test_number_of_new_parameters():
    backbone = tiny_backbone("qwen3")
    before = sum(p.numel() for p in backbone.parameters())
    model = cometlm.attach(backbone, **SMALL)
    width, rank, readouts, layers = 32, 2, 3, 3
    norm, gate, adapter = width, 2 * width, 2 * width * rank
    memory = layers * (norm + gate + adapter + norm + adapter) + (readouts + 1) * width
    assert model.num_parameters() - before == memory


# --- weights that are elsewhere, or not tied ------------------------------------------------


def partly_on_disk(backbone, folder):
    places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm"), "cpu")
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"}
    places |= {"lm_head": "cpu"}
    return accelerate.dispatch_model(backbone, places, main_device="cpu", offload_dir=folder)


def all_on_disk(backbone, folder):
    return accelerate.disk_offload(backbone, folder, execution_device=torch.device("cpu"))


def all_offloaded(backbone, folder):
    return accelerate.cpu_offload(backbone, execution_device=torch.device("cpu"))


def embedding_on_disk(backbone, folder):
    places = dict.fromkeys(("model.layers", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
    places |= {"model.embed_tokens": "disk"}
    return accelerate.dispatch_model(backbone, places, main_device="cpu", offload_dir=folder)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3_text"])  # packed, fused, tied
@pytest.mark.parametrize("offload", [partly_on_disk, all_on_disk, all_offloaded, embedding_on_disk])
@torch.no_grad()
def test_offloaded_backbone(family, offload, tmp_path):
    ids = batch_of(2, 30)
    plain = tiny_comet(family)
    backbone = offload(tiny_backbone(family), tmp_path)
    alone = tiny_backbone(family)(ids).logits
    assert any(p.device.type == "meta" for p in backbone.parameters()) or offload is (
        embedding_on_disk  # tied: accelerate puts it where the head is
    )
    assert error(backbone(ids).logits, alone) < 1e-12
    model = cometlm.attach(backbone, **SMALL)
    for mine, theirs in zip(
        model.model.comet.parameters(), plain.model.comet.parameters(), strict=True
    ):
        mine.copy_(theirs)
    assert error(model(ids).logits, plain(ids).logits) < 1e-12
    cache = model(ids[:, :17]).past_key_values
    rest = model(ids[:, 17:], past_key_values=cache).logits
    assert error(rest, plain(ids).logits[:, 17:]) < 1e-6
    assert error(cometlm.detach(model)(ids).logits, alone) < 1e-12


@torch.no_grad()
def test_attach_does_not_tie_what_the_backbone_has_not_tied():
    """As transformers leaves a checkpoint with two weights and a config that says tied."""
    backbone = tiny_backbone("qwen3", tie_word_embeddings=True)
    head = torch.nn.Parameter(torch.randn(96, 32, dtype=torch.float64))
    backbone.lm_head.weight = head
    ids = random_ids(20)[None]
    before = backbone(ids).logits
    model = cometlm.attach(backbone, **SMALL)
    assert backbone.lm_head.weight is head
    assert torch.equal(cometlm.detach(model)(ids).logits, before)


# --- sizes by default -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("positions", "chunk"), [(5376, 2048), (5375, 1024), (2048, 512), (256, 64), (42, 16)]
)
def test_default_sizes_are_the_largest_of_the_papers_proportions_that_fit(positions, chunk):
    backbone = tiny_backbone("llama", max_position_embeddings=positions)
    if chunk == 2048:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sizes = cometlm.attach(backbone).config.comet_config
    else:
        said = f"max_position_embeddings={positions}: chunk_size={chunk}, "
        with pytest.warns(UserWarning, match=said):
            sizes = cometlm.attach(backbone).config.comet_config
    assert (sizes.chunk_size, sizes.capacity, sizes.readout_tokens) == (chunk, chunk, chunk // 4)
    assert sizes.stride == 8
    assert sizes.row_length <= positions


@pytest.mark.parametrize("sizes", [{"capacity": 2048}, {"stride": 8}], ids=str)
def test_sizes_that_are_given_are_not_changed(sizes):
    with refused("chunk_size=2048 is too large for this backbone"):
        cometlm.attach(tiny_backbone("llama"), **sizes)
    with refused("chunk_size=2048 is too large for this backbone"):
        cometlm.attach(tiny_backbone("llama"), CometConfig())


def test_too_few_positions_for_any_size():
    with refused("but the backbone has max_position_embeddings=41"):
        cometlm.attach(tiny_backbone("llama", max_position_embeddings=41))


def test_an_attention_function_that_somebody_chose_is_named_and_restored():
    backbone = tiny_backbone("llama")
    backbone.config._attn_implementation = "flex_attention"
    with pytest.warns(UserWarning, match="not by 'flex_attention'; detach"):
        model = cometlm.attach(backbone, **SMALL)
    assert cometlm.detach(model).config._attn_implementation == "flex_attention"


def test_plain_attention_that_somebody_chose_is_named_and_restored():
    backbone = tiny_backbone("llama")
    backbone.set_attn_implementation("eager")
    with pytest.warns(UserWarning, match="not by 'eager'; detach"):
        model = cometlm.attach(backbone, **SMALL)
    assert cometlm.detach(model).config._attn_implementation == "eager"


def test_a_model_with_memory_has_one_already():
    model = cometlm.attach(tiny_backbone("llama"), **SMALL)
    with refused("CometForCausalLM already has a memory; detach() it first"):
        cometlm.attach(model, **SMALL)
    model(random_ids(20)[None])
