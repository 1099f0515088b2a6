"""Packed weights: the same numbers, and plain weights where the copy may not be right."""

import copy
import pickle

import pytest
import torch
from torch import nn

import cometlm
from cometlm.core import packed_products
from cometlm.core.packed_products import PackedLinear, PackedProducts
from tests.tiny import error, random_ids, tiny_backbone, tiny_comet

pytestmark = pytest.mark.skipif(
    packed_products._LINEAR is None, reason="this torch has no packed products"
)


@pytest.fixture(autouse=True)
def _any_cpu(monkeypatch):
    """Pack on CPUs without products of bfloat16, too: oneDNN emulates them."""
    monkeypatch.setattr(packed_products, "multiplies_bfloat16", lambda: True)


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(48, 32).to(torch.bfloat16)


def of_layer(layer, x):
    """The layer's outputs, and whether its packed copy made them."""
    used = []
    packed = layer.packed
    known = packed.is_of
    packed.is_of = lambda weight: used.append(known(weight)) or used[-1]
    try:
        return layer(x), used == [True]
    finally:
        del packed.is_of


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_products_are_alike(linear, rows):
    x = torch.randn(2, rows, 48).to(torch.bfloat16)
    with torch.no_grad():
        want = linear(x)
        packed = PackedProducts.of(linear)
        got, used = of_layer(linear, x)
    assert used
    assert packed.nbytes == 48 * 32 * 2
    assert error(got.float(), want.float()) <= torch.finfo(torch.bfloat16).eps


def _step(layer):
    optimizer = torch.optim.SGD(layer.parameters(), 1.0)
    layer(torch.ones(1, 48, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()


def _other_parameter(layer):
    layer.weight = nn.Parameter(layer.weight.detach() + 1)


def _other_data(layer):
    layer.weight.data = layer.weight.data + 1


def _loaded(layer):
    layer.load_state_dict({name: x + 1 for name, x in layer.state_dict().items()})


@pytest.mark.parametrize("change", [_step, _other_parameter, _other_data, _loaded])
def test_a_changed_weight_is_noticed_at_once(linear, change):
    PackedProducts.of(linear)
    change(linear)
    x = torch.randn(1, 48).to(torch.bfloat16)
    with torch.no_grad():
        got, used = of_layer(linear, x)
        assert not used
        assert torch.equal(got, nn.functional.linear(x, linear.weight, linear.bias))


def test_what_is_written_past_autograd_is_noticed_by_a_check(linear):
    packed = PackedProducts.of(linear)
    packed.check()
    assert linear.packed is not None
    linear.weight.data += 1
    packed.check()
    assert linear.packed is None
    assert packed.nbytes == 0
    x = torch.randn(1, 48).to(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(linear(x), nn.functional.linear(x, linear.weight, linear.bias))


def test_gradients_flow_through_the_plain_weight(linear):
    PackedProducts.of(linear)
    linear(torch.ones(1, 48, dtype=torch.bfloat16)).sum().backward()
    assert linear.weight.grad is not None


def test_another_dtype_and_autocast_go_the_plain_way(linear):
    PackedProducts.of(linear)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(torch.ones(1, 48)).dtype == torch.bfloat16
        assert linear.float()(torch.ones(1, 48)).dtype == torch.float32


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_is_plain_and_works(linear, copied):
    PackedProducts.of(linear)
    with torch.no_grad():
        other = copied(linear)
        x = torch.randn(1, 48).to(torch.bfloat16)
        assert other.packed is None
        assert error(other(x).float(), linear(x).float()) <= torch.finfo(torch.bfloat16).eps


def test_only_plain_bfloat16_layers_are_packed():
    class Own(nn.Linear):
        """Somebody's own layer."""

    replaced = nn.Linear(8, 8).to(torch.bfloat16)
    replaced.forward = lambda x: x  # as an offloading hook does
    model = nn.ModuleList([nn.Linear(8, 8), Own(8, 8).to(torch.bfloat16), replaced])
    assert PackedProducts.of(model).nbytes == 0
    assert [type(layer) for layer in model] == [nn.Linear, Own, nn.Linear]


def test_other_cpus_pack_nothing(linear, monkeypatch):
    monkeypatch.setattr(packed_products, "multiplies_bfloat16", lambda: False)
    assert PackedProducts.of(linear).nbytes == 0


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3"])
def test_a_model_says_the_same(family):
    model = tiny_comet(family).to(torch.bfloat16)
    ids = random_ids(40)[None]
    names = set(model.state_dict())
    with torch.no_grad():
        want = model(ids).logits
        size = model.pack_weights()
        linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
        assert size == sum(m.weight.nbytes for m in linear) > 0
        assert all(isinstance(m, PackedLinear) for m in linear)
        assert set(model.state_dict()) == names
        assert error(model(ids).logits.float(), want.float()) < 0.05
        model.unpack_weights()
        assert not any(isinstance(m, PackedLinear) for m in model.modules())
        assert torch.equal(model(ids).logits, want)


def test_packing_twice_holds_one_copy_and_packs_changed_weights():
    model = tiny_comet("llama").to(torch.bfloat16)
    size = model.pack_weights()
    with torch.no_grad():
        for weight in model.parameters():
            weight.data.mul_(2)
        model(random_ids(20)[None])
        assert model.model.packed.nbytes < size
    assert model.pack_weights() == size == model.model.packed.nbytes


def test_a_detached_backbone_is_plain():
    backbone = tiny_backbone("llama").to(torch.bfloat16)
    model = cometlm.attach(backbone, chunk_size=12, readout_tokens=3, stride=4, capacity=5, rank=2)
    model.pack_weights()
    cometlm.detach(model)
    assert not any(isinstance(m, PackedLinear) for m in backbone.modules())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's, beside transformers 5.24
def test_an_adapter_merged_in_place_is_noticed():
    peft = pytest.importorskip("peft")
    model = tiny_comet("llama").to(torch.bfloat16)
    model.pack_weights()
    adapted = peft.get_peft_model(model, cometlm.lora_config(r=2))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.normal_()
        adapted.merge_adapter()
        ids = random_ids(30)[None]
        got = adapted(ids).logits
        model.unpack_weights()
        assert torch.equal(got, adapted(ids).logits)
