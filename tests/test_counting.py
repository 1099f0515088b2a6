"""What `cometlm info` counts, by hand."""

import pytest
import torch

import cometlm
from cometlm import CometConfig
from cometlm.core.footprint import bytes_of_item, bytes_of_memory
from cometlm.planner.flops import LayerSizes, chunk_cost
from tests.any_backbone import tiny
from tests.tiny import SMALL, batch_of


class Sizes:
    """A backbone's config, as far as counting looks at it."""

    model_type = "qwen3"

    def __init__(self, width, heads, inner):
        self.hidden_size, self.intermediate_size, self.head_dim = width, inner, 128
        self.num_attention_heads, self.num_key_value_heads = heads


def test_counted_gain_at_the_sizes_of_the_paper():
    """By hand: 2816 computed items (2048 text, 256 C, 512 R) behind 2560 slots, in 5376 rows."""
    sizes = CometConfig()
    assert (sizes.chunk_items, sizes.memory_rows) == (2816, 2560)

    # Qwen3-0.6B: queries 2048, keys and values 2048 wide. A row: projections and three MLP
    # matrices. Entries stay hidden rows, so all 2560 slots are projected anew.
    row = 1024 * 2048 * 2 + 1024 * 2048 + 3 * 1024 * 3072
    seen = 2816 * 2560 + 2816 * 2817 // 2  # pairs of a query and a key
    fast = 2816 * row + 2560 * 1024 * 2048 + 2 * 2048 * seen
    naive = 5376 * row + 2 * 2048 * (5376 * 5377 // 2)
    cost = chunk_cost(Sizes(1024, (16, 8), 3072), sizes)
    assert (cost.fast, cost.naive) == (fast, naive)
    assert round(cost.gain, 2) == 1.51

    # Qwen3-4B: queries 4096, keys and values 2048 wide, less than a hidden row: kept as such, so
    # only the 512 global slots and 256 new entries are projected.
    row = 2560 * 4096 * 2 + 2560 * 2048 + 3 * 2560 * 9728
    fast = 2816 * row + (512 + 256) * 2560 * 2048 + 2 * 4096 * seen
    naive = 5376 * row + 2 * 4096 * (5376 * 5377 // 2)
    cost = chunk_cost(Sizes(2560, (32, 8), 9728), sizes)
    assert (cost.fast, cost.naive) == (fast, naive)
    assert round(cost.gain, 2) == 1.74


def test_what_a_config_leaves_out_is_as_in_a_plain_decoder():
    """GPT-2 names no key-value heads and calls its widths otherwise; it has no row, so no pairs."""
    assert LayerSizes.of(tiny("gpt2").config) == LayerSizes(32, 32, 64, 32, 48, 48)
    assert LayerSizes.of(tiny("gpt_oss").config) == LayerSizes(32, 32, 32, 32, 2 * 48, 4 * 48)


@pytest.mark.parametrize("kind", ["llama", "qwen3_next"])
def test_bytes_of_a_memory_are_those_of_one_that_is_full(kind):
    """Of one that stays in float32 beside a backbone in less, and with layers' own states."""
    model = cometlm.attach(tiny(kind).to(torch.bfloat16).eval(), **SMALL)
    model.model.comet.float()
    with torch.no_grad():
        cache = model.model(batch_of(1, 120), close_last=True, use_cache=True).past_key_values
        opened = model.model(batch_of(1, 1), use_cache=True).past_key_values
    state, entry = bytes_of_memory(model)
    assert cache.nbytes == state + model.config.comet_config.temporary_slots * entry
    chunks = [layer.open.chunk for layer in opened.layers if layer.open is not None]
    assert bytes_of_item(model) == sum(chunk.nbytes for chunk in chunks)
