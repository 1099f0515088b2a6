"""What version 0.1.0 computed and wrote still holds: numbers, checkpoints, sessions."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import cometlm
from cometlm import CometForCausalLM
from tests.lock import values
from tests.tiny import error, random_ids, tiny_comet


@pytest.fixture(scope="module")
def locked():
    return load_file(values.VALUES)


@pytest.fixture(scope="module")
def expected():
    return load_file(values.EXPECTED)


def test_the_lock_says_what_wrote_it():
    with safe_open(values.VALUES, "pt") as file:
        assert file.metadata()["cometlm"] == "0.1.0"


@pytest.mark.parametrize("case", values.CASES)
def test_numbers(case, locked):
    found = values.computed(case)
    wanted = {
        name.partition("|")[2]: x for name, x in locked.items() if name.startswith(f"{case}|")
    }
    assert set(found) == set(wanted)
    assert torch.equal(found.pop("ids"), wanted.pop("ids"))
    norms = [float(x[0]) for name, x in wanted.items() if name.startswith("grad.")]
    for name, want in wanted.items():
        if name.startswith("grad."):  # one that is nearly zero is all rounding
            assert float((found[name] - want).abs().max()) < 1e-7 * max(norms), name
        else:
            assert error(found[name], want) < 1e-7, name


@pytest.mark.parametrize("merge", [False, True])
def test_a_checkpoint_of_0_1_0_loads(merge, expected):
    model = CometForCausalLM.from_pretrained(values.CHECKPOINT, merge=merge)
    with torch.no_grad():
        logits = model(random_ids(40, seed=6)[None]).logits
    assert error(logits, expected["logits"]) < 1e-4
    assert model.merged == merge


@pytest.mark.parametrize("path", [values.SESSION, values.MERGED_SESSION], ids=lambda p: p.stem)
def test_a_session_of_0_1_0_loads(path, expected):
    model = CometForCausalLM.from_pretrained(values.CHECKPOINT, merge=path == values.MERGED_SESSION)
    session = cometlm.Session.load(path, model)
    assert session.stats().tokens == len(values.TEXT)
    assert session.continuation(30) == expected[path.name].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_shipped_smollm2_answers_and_takes_its_sessions(dtype):
    wanted = json.loads(values.SHIPPED.read_text())[dtype]
    found = values.answers(getattr(torch, dtype))
    assert found["made_by"].pop("settings")  # which 0.1.0 did not write, and sessions load without
    assert found == wanted


@pytest.mark.parametrize("every", [0, 1, 3])
@pytest.mark.parametrize("cut", [7, 12, 24, 31])
def test_gradients_flow_through_a_cache_from_call_to_call(cut, every):
    """Two calls are one: where a chunk is open between them, and where it is not."""
    model = tiny_comet("llama").train()
    ids = random_ids(50)[None]
    if every:
        model.activation_checkpointing_enable({"every": every})

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    later = ids.clone()
    later[:, : cut + 1] = -100  # a call's first token is not a label
    wanted = gradients(model(ids, labels=later).loss)
    past = model(ids[:, :cut], use_cache=True).past_key_values
    got = gradients(model(ids[:, cut:], labels=ids[:, cut:], past_key_values=past).loss)
    assert set(got) == set(wanted)
    for name, want in wanted.items():
        assert error(got[name], want) < 1e-9, name
