"""Real backbones: without memory they are themselves, with it they equal the reference."""

import pytest
import torch

import cometlm
from cometlm.core.reference import reference_generate, reference_logits
from tests import real
from tests.tiny import error

pytestmark = pytest.mark.slow

TEXT = (
    "In the year the lighthouse was built the harbour froze twice. The keeper, a man of few words "
    "called Osk Tamberlane, wrote every evening into a log: the wind, the ships that passed, and "
    "what he had for supper. On the third of March he wrote: the key is under the blue stone. "
    "Nobody read the log until ninety years later, when a pupil of the village school found it in "
    "the attic of the town hall (between tax rolls and a stuffed pike) and copied it out for her "
    "teacher. She could not know that the last page was missing, nor that it had been torn out by "
    "the keeper's own daughter, who had her reasons. 1: ice. 2: fog. 3: herring.\n\n"
    "What the teacher made of it is told in the following chapters, in the order of the log.\n"
)
NAMES = ["smollm2", "gemma3-270m"]
CLOSE = 5e-5  # in float32; measured: at most 7e-6, and 0 without memory


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    """With memory: chunks of 64, so that TEXT is three."""
    return real.model(name)


@pytest.fixture(scope="module")
def ids(name):
    tokens = real.tokenizer(name)(TEXT, return_tensors="pt")["input_ids"]
    assert tokens.shape[1] > 2 * real.SMALL["chunk_size"] + 10
    return tokens[:, : 3 * real.SMALL["chunk_size"]]


@torch.no_grad()
def test_without_memory_it_is_the_backbone(name, ids):
    off = {"global_memory": False, "temporary_memory": False, "chunk_size": 256}
    model = real.model(name, **off)
    ours = model(ids).logits
    backbone = cometlm.detach(model)
    assert type(backbone).__module__.startswith("transformers.models.")
    assert error(ours, backbone(ids).logits) < CLOSE


@torch.no_grad()
def test_without_memory_windows_are_the_backbones_own():
    """Gemma's window of 512 bites inside a chunk."""
    off = {"global_memory": False, "temporary_memory": False, "chunk_size": 1024}
    model = real.model("gemma3-270m", **off)
    assert model.config.backbone_config.sliding_window == 512
    ids = real.tokenizer("gemma3-270m")(TEXT * 5, return_tensors="pt")["input_ids"][:, :800]
    ours = model(ids).logits
    assert error(ours, cometlm.detach(model)(ids).logits) < CLOSE


@torch.no_grad()
def test_with_memory_it_is_the_reference(model, ids):
    assert error(model(ids).logits[0], reference_logits(model, ids[0])) < CLOSE


@torch.no_grad()
def test_memory_is_seen(model, ids):
    """The third chunk's logits depend on the first chunk, else the test above says little."""
    size = real.SMALL["chunk_size"]
    alone = model(ids[:, 2 * size :]).logits
    assert error(alone, model(ids).logits[:, 2 * size :]) > 100 * CLOSE


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[1] * 12, [64, 64], [63, 2, 65], [100, 7]])
def test_pieces_equal_one_call(model, ids, sizes):
    want = model(ids).logits
    cache, parts = None, []
    for piece in ids.split([*sizes, ids.shape[1] - sum(sizes)], dim=1):
        out = model(piece, past_key_values=cache)
        cache = out.past_key_values
        parts.append(out.logits)
    assert error(torch.cat(parts, dim=1), want) < CLOSE


def test_a_session_goes_on_like_the_reference(name, model):
    text = TEXT[:300]
    ids = torch.tensor(real.tokenizer(name)(text)["input_ids"])
    session = cometlm.Session(model, real.tokenizer(name))
    session.read(text)
    assert session.continuation(8) == reference_generate(model, ids, 8)


@torch.no_grad()
def test_detach_gives_the_backbone_back_to_the_bit(name, ids):
    model = real.model(name)
    backbone = cometlm.detach(model)
    before = backbone(ids).logits
    grads = {key: p.requires_grad for key, p in backbone.named_parameters()}
    names = list(backbone.state_dict())
    attached = cometlm.attach(backbone, **real.SMALL)
    assert error(attached(ids).logits, before) > CLOSE
    again = cometlm.detach(attached)
    assert again is backbone
    assert torch.equal(again(ids).logits, before)
    assert {key: p.requires_grad for key, p in again.named_parameters()} == grads
    assert list(again.state_dict()) == names


PROMPTS = {
    "smollm2": "The capital of France is",
    "gemma3-270m": "Question: What is the capital of France?\nAnswer:",
}


def test_converted_weights_know_what_they_should(name):
    """The backbone under the memory is the model it should be."""
    model = real.model(name, stride=64)
    session = cometlm.Session(model, real.tokenizer(name))
    session.read(PROMPTS[name])
    assert "Paris" in real.tokenizer(name).decode(session.continuation(2))
