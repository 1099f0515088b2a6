"""Sizes are refused with the field, the value and the bound; sums against values by hand."""

import dataclasses
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cometlm import CometConfig

SIZES = ["chunk_size", "readout_tokens", "stride", "capacity", "rank"]
SWITCHES = ["global_memory", "temporary_memory", "gate"]
BAD_SIZES = [0, -1, -2048, True, False, 8.0, 1.5, float("nan"), "8", None]

WAYS = {
    "init": lambda **fields: CometConfig(**fields),
    "replace": lambda **fields: CometConfig().replace(**fields),
    "from_dict": lambda **fields: CometConfig.from_dict(fields),
}
way = pytest.mark.parametrize("make", WAYS.values(), ids=WAYS)

configs = st.builds(
    CometConfig,
    **{name: st.integers(1, 10**6) for name in SIZES},
    **{name: st.booleans() for name in SWITCHES},
)


@way
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", BAD_SIZES, ids=repr)
def test_sizes_are_integers_of_at_least_one(make, name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be .*at least 1, got {value!r}"):
        make(**{name: value})


@way
@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("value", [0, 1, "yes", None, 1.0], ids=repr)
def test_switches_are_bools(make, name, value):
    said = f"{name} must be True or False, got {value!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        make(**{name: value})


@way
@pytest.mark.parametrize("value", [-1, 64, 100, True, 1.0, "1", None], ids=repr)
def test_the_overlap_is_shorter_than_a_chunk(make, value):
    with pytest.raises(ValueError, match=rf"^overlap must be .*at least 0.* got {value!r}"):
        make(chunk_size=64, overlap=value)
    assert CometConfig(chunk_size=64, overlap=63).overlap == 63


@pytest.mark.parametrize(
    ("name", "switch"),
    [
        ("readout_tokens", "global_memory"),
        ("stride", "temporary_memory"),
        ("capacity", "temporary_memory"),
    ],
)
def test_zero_points_at_the_switch(name, switch):
    with pytest.raises(ValueError, match=f"set {switch}=False"):
        CometConfig(**{name: 0})


@pytest.mark.parametrize("name", SIZES)
def test_one_is_enough(name):
    assert getattr(CometConfig(**{name: 1}), name) == 1


def test_unknown_field_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown CometConfig field 'temp_mem_budget'") as raised:
        CometConfig.from_dict({"chunk_size": 8, "temp_mem_budget": 4})
    assert all(name in str(raised.value) for name in [*SIZES, *SWITCHES])


@pytest.mark.parametrize(
    ("fields", "global_slots", "temporary_slots", "memory_rows", "chunk_items", "row_length"),
    [
        # SPEC §2 and §5: 2560 memory rows of 5376.
        ({}, 512, 2048, 2560, 2048 + 256 + 512, 5376),
        ({"global_memory": False}, 0, 2048, 2048, 2048 + 256, 4352),
        ({"temporary_memory": False}, 512, 0, 512, 2048 + 512, 3072),
        ({"global_memory": False, "temporary_memory": False}, 0, 0, 0, 2048, 2048),
        # A rest of one text token gets a compression token of its own.
        ({"chunk_size": 13, "readout_tokens": 3, "stride": 4, "capacity": 5}, 3, 5, 8, 20, 28),
        # A stride longer than the chunk.
        ({"chunk_size": 3, "readout_tokens": 1, "stride": 8, "capacity": 1}, 1, 1, 2, 5, 7),
        ({"chunk_size": 5, "readout_tokens": 2, "stride": 1, "capacity": 9}, 2, 9, 11, 12, 23),
    ],
    ids=str,
)
def test_sums(fields, global_slots, temporary_slots, memory_rows, chunk_items, row_length):
    config = CometConfig(**fields)
    assert config.global_slots == global_slots
    assert config.temporary_slots == temporary_slots
    assert config.memory_rows == memory_rows
    assert config.chunk_items == chunk_items
    assert config.row_length == row_length


def test_compression_tokens_with_rests():
    config = CometConfig(stride=4)
    assert [config.compression_tokens(n) for n in range(10)] == [0, 1, 1, 1, 1, 2, 2, 2, 2, 3]
    assert config.replace(temporary_memory=False).compression_tokens(9) == 0


def test_check_positions_shows_the_sum():
    config = CometConfig(chunk_size=13, readout_tokens=3, stride=4, capacity=5)
    config.check_positions(28)
    config.check_positions(None)
    said = (
        "chunk_size=13 is too large for this backbone: global memory 3 + temporary memory 5 + "
        "chunk 13 + compression tokens 4 + readout 3 = 28 positions, but the backbone has "
        "max_position_embeddings=27"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        config.check_positions(27)


@pytest.mark.parametrize("name", ["chunk_size", "capacity", "readout_tokens"])
def test_check_positions_names_the_largest_size(name):
    sizes = {"chunk_size": 40, "capacity": 40, "readout_tokens": 20, "overlap": 0}
    with pytest.raises(ValueError, match=f"^{name}=90 is too large for this backbone"):
        CometConfig(**(sizes | {name: 90})).check_positions(64)


@given(configs, st.integers(1, 10**6))
def test_check_positions_is_the_row_length(config, limit):
    if config.row_length <= limit:
        config.check_positions(limit)
    else:
        with pytest.raises(ValueError, match=f"= {config.row_length} positions"):
            config.check_positions(limit)


def test_frozen():
    config = CometConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.stride = 4
    assert config.replace(stride=4).stride == 4
    assert config.stride == 8


@given(configs)
def test_dict_round_trip(config):
    values = json.loads(json.dumps(config.to_dict()))
    assert set(values) == {*SIZES, *SWITCHES, "overlap"}
    assert CometConfig.from_dict(values) == config
