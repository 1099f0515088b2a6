"""Models that read images too: their language models get a memory, and all of them comes back."""

import pytest
import torch
import transformers
from transformers import AutoModelForImageTextToText

import cometlm
from cometlm import Session
from tests.any_backbone import written
from tests.image_text import BEGIN, MODEL_TYPES, outcome, table, tiny
from tests.test_any_backbone import check
from tests.tiny import SMALL, error, random_ids, refused, scramble

AT_LEAST = 30  # of the types that any version lists
# For the default suite: what each adds to a language model alone stands beside it.
SAMPLE = {
    "llava": "a family with a row",
    "qwen2_5_vl": "positions in time, height and width",
    "aya_vision": "a head whose products are not scaled, whatever the config says",
    "gemma3": "masks that are made outside of the language model",
}
IDS = random_ids(43)[None]


def known(model_type):
    if model_type not in MODEL_TYPES:
        pytest.skip("this transformers has no such type")
    return tiny(model_type)


def attached(backbone):
    with pytest.warns(UserWarning, match="reads more than text: its language model"):
        model = cometlm.attach(backbone, **SMALL)
    scramble(model.model.comet, 0.5)
    return model


@pytest.mark.filterwarnings("ignore:.*reads more than text")
@pytest.mark.parametrize("model_type", SAMPLE)
def test_the_language_model_of_an_image_text_model(model_type):
    known(model_type)
    check(outcome(model_type))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_whole_registry():
    found = [outcome(model_type) for model_type in MODEL_TYPES]
    fit = [one for one in found if one.attaches]
    for one in fit:
        check(one)
    assert len(fit) >= AT_LEAST
    if transformers.__version__.startswith("5.24."):
        assert table(found).strip() == written(BEGIN).strip()


def test_the_class_that_gets_the_memory_is_named():
    said = r"LlavaForConditionalGeneration .* \(LlamaModel\) gets the memory, and reads text alone"
    with pytest.warns(UserWarning, match=said):
        cometlm.attach(known("llava"), **SMALL)


@pytest.mark.parametrize("name", ["pixel_values", "image_grid_thw", "pixel_values_videos"])
def test_images_are_refused_by_name(name):
    model = attached(known("llava"))
    picture = {name: torch.zeros(1, 3, 28, 28)}
    said = f"{name} cannot be read: with a memory a model reads text alone"
    with refused(said):
        model(IDS, **picture)
    with refused(said):
        model.generate(IDS, max_new_tokens=2, **picture)


def test_tokens_that_a_processor_calls_text():
    model = attached(known("gemma3"))
    kinds = torch.zeros_like(IDS)
    assert torch.equal(model(IDS, token_type_ids=kinds).logits, model(IDS).logits)
    greedy = {"max_new_tokens": 5, "do_sample": False}
    written = model.generate(IDS, token_type_ids=kinds, **greedy)
    assert torch.equal(written, model.generate(IDS, **greedy))
    kinds[0, 3] = 1
    with refused("forward() does not take token_type_ids"):
        model(IDS, token_type_ids=kinds)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llava", "qwen2_5_vl"])
def test_the_whole_model_comes_back(model_type):
    backbone = known(model_type)
    backbone.config.vision_config._attn_implementation = "eager"
    weights = {name: p.clone() for name, p in backbone.state_dict().items()}
    want = backbone(input_ids=IDS).logits
    model = attached(backbone)
    assert backbone.config.vision_config._attn_implementation == "eager"
    ours = {id(p) for p in model.parameters()}
    assert not [n for n, p in backbone.named_parameters() if "vision" in n and id(p) in ours]
    returned = cometlm.detach(model)
    assert returned is backbone
    assert backbone.config.vision_config._attn_implementation == "eager"
    assert backbone.config.get_text_config()._attn_implementation == "sdpa"
    assert torch.equal(returned(input_ids=IDS).logits, want)
    assert all(torch.equal(p, weights[name]) for name, p in returned.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llava", "qwen2_5_vl", "gemma3"])
def test_checkpoints_and_sessions(model_type, tmp_path):
    known(model_type).float().save_pretrained(tmp_path / "backbone")
    model = attached(AutoModelForImageTextToText.from_pretrained(tmp_path / "backbone"))
    session = Session(model)
    session.read(IDS[0, :30].tolist())
    session.save(tmp_path / "text.comet")
    said = session.fork().continuation(8)
    for whole in (False, True):
        model.save_pretrained(tmp_path / "saved", backbone=whole)
        again = cometlm.CometForCausalLM.from_pretrained(tmp_path / "saved")
        assert error(again(IDS).logits, model(IDS).logits) < 1e-6
        assert Session.load(tmp_path / "text.comet", again).continuation(8) == said
        vision = dict(cometlm.detach(again).state_dict())
        for name, p in model._backbone.state_dict().items():
            assert torch.equal(vision[name], p), name


def test_training():
    model = attached(known("qwen2_5_vl")).train()
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.model.comet.parameters())
