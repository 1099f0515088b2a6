"""Reading chunks that are recorded: the same numbers, and values that nothing overwrites."""

import copy

import pytest
import torch

from cometlm.core.recorded_chunks import RecordedChunks
from cometlm.core.state import tensors_of
from tests.tiny import FAMILIES, batch_of, error, tiny_comet

CHUNK = 12


class Replays:
    """A recorder whose replays write into the tensors of the first run, as a device's do."""

    def __init__(self, failing=None):
        self.failing, self.recordings, self.replays = failing, 0, 0

    def recorded(self, work, device):
        if self.failing is not None:
            raise self.failing
        self.recordings += 1
        out, after = work()
        left = [out, *tensors_of(after)]
        given = [x.clone() for x in left]

        def replay():
            self.replays += 1
            new_out, new_after = work()
            for old, new, first in zip(left, [new_out, *tensors_of(new_after)], given, strict=True):
                if old is not new:  # what goes in is not written by the work
                    old.copy_(new)
                del first
            return out, after

        return replay


def recording(model, **failing):
    recorder = Replays(**failing)
    model.model._recorded = RecordedChunks(recorder)
    return recorder


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_recorded_chunks_read_as_others_do(family):
    """In one call and in several, with values that were kept from before left as they were."""
    model, ids = tiny_comet(family), batch_of(2, 12 * CHUNK + 5)
    wanted = model(ids, use_cache=True)
    recorder = recording(model)
    whole = model(ids, use_cache=True)
    assert error(whole.logits, wanted.logits) < 1e-12
    assert recorder.recordings == 1
    assert recorder.replays > 3
    past, kept, logits = None, [], []
    for start in range(0, ids.shape[1], 3 * CHUNK):
        out = model(
            ids[:, start : start + 3 * CHUNK],
            past_key_values=past,
            use_cache=True,
            close_last=start + 3 * CHUNK < ids.shape[1],
        )
        past = out.past_key_values
        kept.append((past, [x.clone() for x in tensors_of(past.layers)]))
        logits.append(out.logits)
    assert error(torch.cat(logits, 1), wanted.logits) < 1e-12
    for cache, values in kept:
        for one, other in zip(tensors_of(cache.layers), values, strict=True):
            assert torch.equal(one, other)
    for one, other in zip(
        tensors_of(past.layers), tensors_of(wanted.past_key_values.layers), strict=True
    ):
        assert error(one, other) < 1e-12


@torch.no_grad()
def test_what_is_no_whole_chunk_with_a_full_memory_is_not_recorded():
    model = tiny_comet("llama")
    recorder = recording(model)
    model(batch_of(1, 2 * CHUNK))  # the memory is not full yet
    lengths = [[CHUNK, 7, CHUNK - 1] * 4] * 2
    model(batch_of(2, sum(lengths[0])), chunk_lengths=[lengths[0], lengths[1][::-1]])
    assert recorder.recordings == 0
    with torch.enable_grad():
        model(batch_of(1, 12 * CHUNK))
    assert recorder.recordings == 0


@torch.no_grad()
def test_weights_that_moved_are_recorded_anew():
    model, ids = tiny_comet("llama"), batch_of(1, 12 * CHUNK)
    recorder = recording(model)
    model(ids)
    layer = model.model.cells[0].layer
    layer.mlp.up_proj.weight = torch.nn.Parameter(layer.mlp.up_proj.weight * 0.5)
    twin = copy.deepcopy(model)
    assert twin.model._recorded is not model.model._recorded
    assert error(model(ids).logits, twin(ids).logits) < 1e-12
    assert recorder.recordings == 2


@torch.no_grad()
def test_work_that_cannot_be_recorded_goes_on():
    model, ids = tiny_comet("llama"), batch_of(1, 12 * CHUNK)
    wanted = model(ids).logits
    recording(model, failing=RuntimeError("no graphs here"))
    with pytest.warns(UserWarning, match="chunks are not recorded.* no graphs here"):
        assert torch.equal(model(ids).logits, wanted)
    assert torch.equal(model(ids).logits, wanted)  # says it once


@torch.no_grad()
def test_a_cpu_records_nothing():
    model, ids = tiny_comet("llama"), batch_of(1, 12 * CHUNK)
    wanted = model(ids).logits
    model.model.record_chunks()
    assert torch.equal(model(ids).logits, wanted)
    model.model.record_chunks(False)
    assert model.model._recorded is None
