"""Rotary tables: the backbone's own numbers, shared by layers and kept for a few lengths."""

import pytest
import torch

from cometlm.backbones.calling import LayerCall
from cometlm.backbones.families import layer_type
from cometlm.backbones.rotary import AllKinds, Given, RotaryTables, Rotation
from cometlm.backbones.taking_apart import take_apart
from tests.tiny import FAMILIES, tiny_backbone

HERE = torch.device("cpu")


def tables_of(family):
    parts = take_apart(tiny_backbone(family))
    return RotaryTables(parts.rotations), parts


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_each_layer_has_its_types_table(family, dtype):
    tables, parts = tables_of(family)
    like, positions = torch.empty(0, dtype=dtype), torch.arange(20)[None]
    found = tables.of(20, like, [HERE] * 3)
    for i, (cos, sin) in enumerate(found):
        kind = [layer_type(parts.config, i)] if parts.family.rotary_by_layer_type else []
        wanted = parts.rotations[i].module(like, positions, *kind)
        assert torch.equal(torch.stack([cos, sin]), torch.cat(wanted))
    assert found[0] is found[2]  # layers 0 and 2 are of one type in every family


def test_the_last_few_lengths_are_kept():
    tables, _ = tables_of("qwen3")
    like = torch.empty(0, dtype=torch.float64)
    first = tables.of(10, like, [HERE] * 3)
    assert tables.of(10, like, [HERE] * 3) is first
    assert tables.of(10, like.float(), [HERE] * 3) is not first
    for length in range(11, 30):
        tables.of(length, like, [HERE] * 3)
    assert len(tables) == 4
    assert tables.of(10, like, [HERE] * 3) is not first


def test_positions_in_time_height_and_width_are_alike_for_text():
    """As transformers 5.10 calls Qwen2.5-VL's: a table for each kind, which the layer mixes."""

    class Kinds(torch.nn.Module):
        def forward(self, like, positions):
            assert positions.shape == (3, 1, 7)
            return positions[..., None] * torch.ones(4), -positions[..., None] * torch.ones(4)

    class Layer(torch.nn.Module):
        def forward(self, hidden, attention_mask, position_embeddings, comet):
            self.given = position_embeddings
            return hidden

    rotation = Rotation(Kinds(), (Given.LIKE, AllKinds(3)), kinds=3)
    table = rotation.table(7, torch.empty(0))
    assert [part.shape for part in table] == [(7, 4), (7, 4)]
    layer, hidden = Layer(), torch.zeros(1, 7, 8)
    LayerCall(kinds=3)(layer, hidden, tuple(part[None] for part in table), None)
    for mine, part in zip(layer.given, table, strict=True):
        assert mine.shape == (3, 1, 7, 4)
        assert all(torch.equal(kind[0], part) for kind in mine)
