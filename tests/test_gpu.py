"""What depends on the device, against the same in float64 on the CPU.

The tests run on the accelerator if there is one, else on the CPU: a rehearsal, so that nothing is
run for the first time where minutes are few. Tests that only an accelerator can answer are skipped
without one, which pytest's summary says once.
"""

import copy
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch

import cometlm
from cometlm.backbones.calling import KeyValue
from cometlm.backbones.rotary import RotaryTables
from cometlm.backbones.taking_apart import take_apart
from cometlm.core.attention import attend_one_part
from cometlm.core.recording import Recorder
from cometlm.device import default_device
from cometlm.train.config import StepShape
from cometlm.train.fixed_step import FixedStep, Weights
from tests.test_attention import plain
from tests.test_fixed_step import LEARNED
from tests.test_fixed_step import batch as fixed_batch
from tests.tiny import (
    FAMILIES,
    SMALL,
    batch_of,
    error,
    random_ids,
    scramble,
    tiny_backbone,
    tiny_comet,
)

pytestmark = pytest.mark.gpu

DEVICE = default_device()
ACCELERATED = DEVICE.type != "cpu"
needs_accelerator = pytest.mark.skipif(not ACCELERATED, reason="there is no accelerator here")

# max |difference| / max |reference|, of outputs and of gradients. Tiny random models are badly
# conditioned (weights of 0.3 to 0.5 where trained ones have 0.02), which costs two to three digits.
# On a CPU the worst are 2e-6 and 2e-6 in float32, 0.04 and 0.09 in bfloat16, 0.008 and 0.006 in
# float16.
BOUNDS = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (1e-4, 1e-3),
    torch.bfloat16: (0.1, 0.2),
    torch.float16: (0.02, 0.03),
}
DTYPES = pytest.mark.parametrize("dtype", list(BOUNDS), ids=lambda dtype: str(dtype)[6:])
# What a kernel alone may be off by: its inputs are rounded, its sums are in float32.
KERNEL = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 3e-2,
    torch.float16: 4e-3,
}


def on_device(model, dtype=torch.float64):
    """A copy of a model on the device; the model itself stays in float64 on the CPU.

    transformers computes cosines and sines in float32 whatever the model's dtype, and each device
    rounds them its own way, which in float64 would be the largest error by far. So the copy has the
    model's own; `test_rotary_tables` compares what the device makes of them.
    """
    twin = copy.deepcopy(model).to(DEVICE, dtype)
    twin.model.rotary_emb.forward = partial(made_by, model.model.rotary_emb)
    return twin


def made_by(rotary, like, position_ids, *layer_type):
    """Cosines and sines of a rotary module on the CPU, sent to where they are wanted."""
    tables = rotary(like.to("cpu"), position_ids.to("cpu"), *layer_type)
    return tuple(table.to(like.device) for table in tables)


def home(x):
    return x.detach().to("cpu", torch.float64)


def calm(model):
    """A model whose weights are small enough that half precision says something about it."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.4)
    return model


# --- attention ---


@DTYPES
@pytest.mark.parametrize(("new", "before"), [(24, 0), (9, 15), (1, 23), (2, 20)])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (8, 1)])
def test_attention_in_one_part(dtype, new, before, window, heads):
    torch.manual_seed(0)

    def random(count, length):
        return torch.randn(2, count, length, 16).to(dtype)

    query = random(heads[0], new)
    parts = [random(heads[1], n) for n in (40, 40, before + new, before + new)]
    own = torch.arange(before, before + new)[:, None]
    distance = own - torch.arange(before + new)
    visible = (distance >= 0) & (distance < (window or 10**6))
    causal = before == 0 and window is None and new > 1
    full = None if causal else torch.cat([torch.ones(new, 40, dtype=torch.bool), visible], 1)
    if new == 1 and window is None:
        full = None
    weights = torch.randn(2, heads[0], new, 16, dtype=torch.float64)

    def run(attend, device, wide, mask):
        leaves = [x.to(device, wide).requires_grad_() for x in (query, *parts)]
        memory, chunk = KeyValue(*leaves[1:3]), KeyValue(*leaves[3:])
        out = attend(leaves[0], memory, chunk, mask)
        return [out, *torch.autograd.grad((out * weights.to(out)).sum(), leaves)]

    def ours(query, memory, chunk, mask):
        return attend_one_part(query, memory, chunk, mask, causal, 0.25)

    def theirs(query, memory, chunk, _):
        return plain(query, memory, chunk, visible, 0.25)

    got = run(ours, DEVICE, dtype, None if full is None else full.to(DEVICE))
    want = run(theirs, "cpu", torch.float64, None)
    for one, other in zip(got, want, strict=True):
        assert error(home(one), other) < KERNEL[dtype]


# --- reading ---


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_rotary_tables(family):
    """The same to float32's rounding, in which transformers computes them."""
    parts, length = take_apart(tiny_backbone(family)), 5000
    made = []
    for place in (torch.device("cpu"), DEVICE):
        tables = RotaryTables(
            [replace(x, module=copy.deepcopy(x.module).to(place)) for x in parts.rotations]
        )
        like = torch.empty(0, dtype=torch.float64, device=place)
        made.append(tables.of(length, like, [place] * len(parts.layers)))
    for wanted, got in zip(*made, strict=True):
        for one, other in zip(wanted, got, strict=True):
            # The angles are the same; either device's cosine may be off by two units in its last
            # place, each of which is half of `eps`.
            assert float((home(other) - one).abs().max()) <= 2 * torch.finfo(torch.float32).eps


@DTYPES
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_logits_and_gradients_of_every_family(family, dtype):
    """Windows (mistral, gemma3) and mixtures of experts among them."""
    model = calm(tiny_comet(family))
    if dtype in (torch.bfloat16, torch.float16) and family == "qwen3_moe":
        pytest.skip("rounding chooses other experts")
    ids = batch_of(2, 40)
    check_same(model, on_device(model, dtype), ids, None, BOUNDS[dtype])


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_rows(family, side):
    model = tiny_comet(family)
    mask = torch.ones(3, 40, dtype=torch.long)
    for row, missing in ((1, 7), (2, 25)):
        mask[row, slice(0, missing) if side == "left" else slice(40 - missing, 40)] = 0
    check_same(model, on_device(model, torch.float32), batch_of(3, 40), mask, BOUNDS[torch.float32])


def check_same(model, twin, ids, mask, bounds):
    """Loss and gradients in one pass, and logits."""
    results = []
    for one in (model, twin):
        place = one.device
        own = None if mask is None else mask.to(place)
        one.train().zero_grad()
        labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
        loss = one(ids.to(place), attention_mask=own, labels=labels.to(place)).loss
        loss.backward()
        with torch.no_grad():
            logits = one.eval()(ids.to(place), attention_mask=own).logits
        if mask is not None:
            logits = logits[own.bool()]
        results.append((loss, logits, {n: p.grad for n, p in one.named_parameters()}))
    (loss, logits, wanted), (loss2, logits2, got) = results
    assert error(home(loss2), loss) < bounds[0]
    assert error(home(logits2), logits) < bounds[0]
    largest = max(float(g.abs().max()) for g in wanted.values() if g is not None)
    for name, grad in wanted.items():
        assert (grad is None) == (got[name] is None), name
        if grad is not None:
            # Against the largest of all: a gradient that is nearly zero is all rounding.
            assert float((home(got[name]) - grad).abs().max()) < bounds[1] * largest, name


def test_ids_may_stay_on_the_cpu():
    model = tiny_comet("llama")
    twin, ids = on_device(model), random_ids(30)[None]
    out = twin(ids)
    assert out.logits.device.type == DEVICE.type
    assert error(home(out.logits), model(ids).logits) < 1e-9


def test_what_is_refused():
    twin = on_device(tiny_comet("llama"))
    with pytest.raises(ValueError, match="input_ids"):
        twin(torch.tensor([[5, 96]], device=DEVICE))
    with torch.no_grad():
        twin.model.comet.layers[1].global_memory.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"layer 1 is not finite.*chunk 0"):
        twin(random_ids(40)[None].to(DEVICE))


# --- recomputation, offloading ---


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_recomputation(every, offload, dtype):
    model = tiny_comet("llama").train()
    ids = batch_of(2, 70)
    twin = on_device(model, dtype)
    wanted = gradients(model, ids)
    twin.activation_checkpointing_enable({"every": every}, offload=offload)
    for one, other in zip(gradients(twin, ids.to(DEVICE)), wanted, strict=True):
        assert error(home(one), other) < BOUNDS[dtype][1]


def test_borders_that_a_device_is_still_copying_when_they_are_wanted():
    """Wide borders, many of them, offloaded without waiting."""
    width, chunks = (512, 60) if ACCELERATED else (64, 14)
    backbone = tiny_backbone("llama", hidden_size=width, head_dim=width // 4)
    model = cometlm.attach(backbone, chunk_size=32, readout_tokens=32, stride=2, capacity=96)
    twin = on_device(calm(model), torch.float32).train()
    ids = batch_of(2, 32 * chunks).to(DEVICE)
    twin.activation_checkpointing_enable()
    wanted = gradients(twin, ids)
    for every in (1, 5):
        twin.activation_checkpointing_enable({"every": every}, offload=True)
        for one, other in zip(gradients(twin, ids), wanted, strict=True):
            assert error(home(one), home(other)) < BOUNDS[torch.float32][1]


def gradients(model, ids):
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_dropout_is_drawn_again_when_chunks_run_again():
    twin = on_device(tiny_comet("llama"), torch.float32).train()
    for cell in twin.model.cells:
        cell.layer.self_attn.attention_dropout = 0.2
    ids = batch_of(2, 50).to(DEVICE)
    torch.manual_seed(3)
    wanted = gradients(twin, ids)
    twin.activation_checkpointing_enable()
    torch.manual_seed(3)
    for one, other in zip(gradients(twin, ids), wanted, strict=True):
        assert error(home(one), home(other)) < 1e-4


# --- autocast, compiling ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_autocast(dtype, recompute):
    model = calm(tiny_comet("llama")).train()
    ids = batch_of(2, 50)
    twin = on_device(model, torch.float32)
    if recompute:
        twin.activation_checkpointing_enable()
    with torch.autocast(DEVICE.type, dtype):
        loss = twin(ids.to(DEVICE), labels=ids.to(DEVICE)).loss
    loss.backward()
    wanted = model(ids, labels=ids).loss
    assert loss.dtype == torch.float32
    assert 0 < error(home(loss), wanted) < 0.05
    assert all(p.grad.dtype == torch.float32 for p in twin.parameters() if p.grad is not None)


def test_a_recorded_training_step():
    """Its gradients are those of the step as it is, with the values of another batch too."""
    shape, weights = StepShape(rows=2, chunks=(12, 9, 12)), Weights(1.0, 1.0)
    given = fixed_batch(shape)
    other = replace(given, ids=given.ids.flip(1), asked=given.asked.flip(0))
    model = on_device(tiny_comet("llama"), torch.float32).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    plain = FixedStep(model, shape, LEARNED, given, weights, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a step that could not be recorded warns
        recorded = FixedStep(model, shape, LEARNED, given, weights, Recorder(warm_ups=1))
        for some in (given, other, given):
            wanted = plain(some).tolist()
            grads = [None if p.grad is None else p.grad.clone() for p in trained]
            assert recorded(some).tolist() == pytest.approx(wanted, rel=1e-4)
            for parameter, grad in zip(trained, grads, strict=True):
                assert (parameter.grad is None) == (grad is None)
                if grad is not None:
                    assert error(home(parameter.grad), home(grad)) < BOUNDS[torch.float32][1]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_recorded_chunks(family):
    model, ids = tiny_comet(family), batch_of(2, 151)
    twin = on_device(model)
    twin.model.record_chunks()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # chunks that could not be recorded warn
        first = twin(ids[:, :100].to(DEVICE), use_cache=True, close_last=True)
        second = twin(ids[:, 100:].to(DEVICE), past_key_values=first.past_key_values)
    got = torch.cat([first.logits, second.logits], dim=1)
    assert error(home(got), model(ids).logits) < BOUNDS[torch.float64][0]


def test_compiled_cells():
    """One layer, since each is compiled by itself and takes its seconds.

    A chunk without memory, one with it, and a token behind them: one chunk more than the trial of
    `compile_cells`, which goes backward too. Each further shape would be compiled anew, and all of
    them without gradients.
    """
    model = cometlm.attach(tiny_backbone("llama", num_hidden_layers=1), **SMALL)
    scramble(model.model.comet, 0.5)
    twin, ids = on_device(model, torch.float32), batch_of(1, 25)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler's own parts
        # tests/test_compiling.py has the CPU's compiler
        assert twin.model.compile_cells(**({} if ACCELERATED else {"backend": "eager"}))
        assert error(home(twin(ids.to(DEVICE)).logits), model(ids).logits) < 1e-3


# --- generation, sessions ---


@pytest.mark.parametrize("kind", [None, "static"])
@pytest.mark.parametrize("batch", [1, 3])
def test_generation(kind, batch):
    """Over chunk borders; a recorded step is replayed where the device can."""
    model, ids = tiny_comet("mistral"), batch_of(batch, 31)
    options = {"max_new_tokens": 40, "do_sample": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a step that could not be recorded warns
        got = on_device(model).generate(ids.to(DEVICE), cache_implementation=kind, **options)
    assert torch.equal(got.cpu(), model.generate(ids, **options))


@needs_accelerator
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_recorded(family):
    model, ids = on_device(tiny_comet(family), torch.float32), batch_of(2, 31).to(DEVICE)
    options = {"max_new_tokens": 30, "do_sample": False}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = model.generate(ids, cache_implementation="static", **options)
    assert torch.equal(got, model.generate(ids, **options))
    assert family == "qwen3_moe" or not [x for x in caught if "not recorded" in str(x.message)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_session_moves_between_devices(tmp_path, dtype):
    model = tiny_comet("llama").to(dtype)
    twin = on_device(model, dtype)
    session = twin.session()
    session.read(random_ids(77))
    session.save(tmp_path / "there")
    here = cometlm.Session.load(tmp_path / "there", model)
    assert here.stats() == session.stats()
    assert len(here.continuation(9)) == 9
    here.save(tmp_path / "back")
    again = cometlm.Session.load(tmp_path / "back", twin)
    assert again.continuation(12) == session.continuation(12)


@needs_accelerator
def test_two_streams():
    """Two readers on streams of their own, side by side."""
    model = tiny_comet("llama")
    twin = on_device(model)
    texts = [random_ids(400, seed=seed) for seed in (1, 2)]
    streams = [torch.Stream(device=DEVICE) for _ in texts]
    for stream in streams:
        stream.wait_stream(torch.accelerator.current_stream(DEVICE))
    sessions = [twin.session() for _ in texts]
    for start in range(0, 400, 25):
        for stream, session, text in zip(streams, sessions, texts, strict=True):
            before = torch.accelerator.current_stream(DEVICE)
            torch.accelerator.set_stream(stream)
            session.read(text[start : start + 25])
            torch.accelerator.set_stream(before)
    torch.accelerator.synchronize(DEVICE)
    for session, text in zip(sessions, texts, strict=True):
        alone = model.session()
        alone.read(text)
        assert session.continuation(5) == alone.continuation(5)


@needs_accelerator
@pytest.mark.parametrize("training", [False, True])
def test_chunks_do_not_wait_for_the_device(training):
    """The number of waits is that of the call, not that of its chunks."""
    module = torch.get_device_module(DEVICE)
    if not hasattr(module, "set_sync_debug_mode"):
        pytest.skip(f"{DEVICE.type} does not say when it waits")
    twin = on_device(tiny_comet("llama"), torch.float32).train(training)
    if training:
        twin.activation_checkpointing_enable()
    counts = []
    for chunks in (4, 4, 40):  # the first call makes tables
        ids = batch_of(1, 12 * chunks).to(DEVICE)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module.set_sync_debug_mode("warn")
            try:
                if training:
                    twin(ids, labels=ids).loss.backward()
                else:
                    with torch.no_grad():
                        twin(ids, logits_to_keep=1)
            finally:
                module.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(one.message) for one in caught))
    assert counts[2] <= counts[1] + 2, counts


@needs_accelerator
def test_peak_memory_is_flat():
    """Ten times the text takes the memory of the text."""
    twin = on_device(tiny_comet("llama"), torch.bfloat16)
    peaks = []
    for tokens in (600, 600, 6000):
        session = twin.session()
        torch.accelerator.reset_peak_memory_stats(DEVICE)
        session.read(random_ids(tokens))
        peaks.append(torch.accelerator.max_memory_allocated(DEVICE))
    assert peaks[2] <= 1.02 * peaks[1]
