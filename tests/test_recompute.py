"""Recomputation: the plain graph's loss and gradients, with the graph of one chunk."""

import pytest
import torch
from peft import LoraConfig

import cometlm
from cometlm.compat import ACTIVATION_CHECKPOINTING
from cometlm.core.cell import Cell
from cometlm.core.recompute import Recomputation, _Run, _Span, _Vault
from cometlm.core.training_plan import TrainingPlan
from tests.tiny import FAMILIES, batch_of, error, tiny_backbone, tiny_comet

EVERY = [1, 2, 3, 100]  # of four to six chunks: spans of one, even ones, a rest, a single span


def gradients(model, ids, **inputs):
    """Loss, and the gradient of every parameter that has one."""
    model.zero_grad()
    loss = model(ids, labels=ids, **inputs).loss
    loss.backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), got


def check_same(model, ids, every=1, bound=1e-9, **inputs):
    """Recomputed and plain runs agree; returns the plain gradients."""
    model.activation_checkpointing_disable()
    loss, plain = gradients(model, ids, **inputs)
    model.activation_checkpointing_enable({"every": every})
    again, got = gradients(model, ids, **inputs)
    assert error(again, loss) < bound
    assert got.keys() == plain.keys()
    for name, wanted in plain.items():
        assert error(got[name], wanted) < bound, name
    return plain


@pytest.mark.parametrize(
    ("family", "every"), [*((family, 3) for family in FAMILIES), *(("llama", n) for n in EVERY)]
)
def test_gradients_are_the_plain_graphs(family, every):
    plain = check_same(tiny_comet(family).train(), batch_of(2, 70), every)
    for part in ("embed_tokens", "comet.readout", "comet.compression", "gate", "norm.weight"):
        assert any(part in name for name in plain), part


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_batches(side, every):
    mask = torch.ones(3, 50)
    for row, pads in enumerate((0, 13, 37)):
        columns = slice(0, pads) if side == "left" else slice(50 - pads, 50)
        mask[row, columns] = 0
    check_same(tiny_comet("qwen3").train(), batch_of(3, 50), every, attention_mask=mask)


@pytest.mark.parametrize("length", [1, 11, 12, 13, 24, 25])
def test_few_chunks(length):
    """In a single chunk nothing reads the memory: its weights get no gradient."""
    plain = check_same(tiny_comet("llama").train(), batch_of(2, max(2, length)))
    assert any("comet.layers" in name for name in plain) == (length > 12)


@pytest.mark.parametrize(
    "switch", [{"global_memory": False}, {"temporary_memory": False}, {"gate": False}], ids=str
)
def test_parts_of_the_memory_switched_off(switch):
    check_same(tiny_comet("llama", **switch).train(), batch_of(1, 60), every=2)


@pytest.mark.parametrize("capacity", [1, 3, 4, 7, 64])
def test_capacities(capacity):
    """The FIFO drops whole blocks, parts of blocks, or nothing."""
    check_same(tiny_comet("llama", capacity=capacity).train(), batch_of(1, 60))


def test_only_the_memory_trained():
    model = tiny_comet("llama").train().requires_grad_(False)
    model.model.comet.requires_grad_(True)
    plain = check_same(model, batch_of(1, 60))
    assert all("comet" in name for name in plain)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.")  # asked by peft
@pytest.mark.parametrize("wrapped", [False, True])
def test_lora_beside_the_memory(wrapped):
    model = tiny_comet("llama").train()
    if wrapped:
        from peft import get_peft_model

        model = get_peft_model(model, cometlm.lora_config(r=2, dropout=0.3)).double()
        inner = model.get_base_model()
    else:
        model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.3))
        model.model.comet.requires_grad_(True)
        inner = model.double()
    ids = batch_of(2, 60)
    results = []
    for every in (0, 1, 3):
        if every:
            inner.activation_checkpointing_enable({"every": every})
        torch.manual_seed(3)  # dropout: the second run of a chunk must draw what the first drew
        results.append((gradients(model, ids), torch.rand(1)))
    (loss, plain), after = results[0]
    assert any(".lora_A." in name for name in plain)
    assert any("comet" in name for name in plain)
    for (again, got), state in results[1:]:
        assert torch.equal(state, after)  # and leaves the generator where the plain run does
        assert error(again, loss) < 1e-9
        for name, wanted in plain.items():
            assert error(got[name], wanted) < 1e-9, name


def test_float32():
    """Within 1e-5."""
    check_same(tiny_comet("qwen3").float().train(), batch_of(1, 80), bound=1e-5)


def test_autocast():
    """A chunk runs again under the autocast that it ran under."""
    model = tiny_comet("llama").float().train()
    ids = batch_of(1, 60)
    results = []
    for on in (False, True):
        if on:
            model.activation_checkpointing_enable()
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, wanted in results[0].items():
        assert error(results[1][name], wanted) < 1e-2, name
    without = gradients(model, ids)[1]
    assert max(error(results[1][n], without[n]) for n in without) > 1e-3  # it did round


def test_the_hidden_states_path():
    """What trl's trainer takes: the backbone model's output and a loss of its own."""
    model = tiny_comet("llama").train()
    ids = batch_of(2, 50)
    results = []
    for on in (False, True):
        if on:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model.model(ids).last_hidden_state.square().sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append(grads)
    assert results[0].keys() == results[1].keys()
    for name, wanted in results[0].items():
        assert error(results[1][name], wanted) < 1e-9


def test_going_on_from_a_cache():
    """Truncated by hand: gradients stop at a cache that was read without a graph."""
    model = tiny_comet("llama").train()
    ids = batch_of(1, 60)
    with torch.no_grad():
        cache = model(ids[:, :30], use_cache=True).past_key_values
    check_same(model, ids[:, 30:], past_key_values=cache)
    model.activation_checkpointing_enable()
    out = model(ids[:, 30:], past_key_values=cache, use_cache=True)
    model.activation_checkpointing_disable()
    wanted = model(ids[:, 30:], past_key_values=cache, use_cache=True)
    got = model(ids[:, :9], past_key_values=out.past_key_values).logits
    assert error(got, model(ids[:, :9], past_key_values=wanted.past_key_values).logits) < 1e-9


# --- truncation ---------------------------------------------------------------------------------


def reached(model, every):
    """Chunks whose tokens the last chunk's loss has a gradient for."""
    model.activation_checkpointing_enable({"every": every, "truncate_after": 2})
    ids = torch.arange(3, 3 + 72)[None] % 96
    ids[0] = torch.randperm(72) + 3
    model.zero_grad()
    labels = torch.full_like(ids, -100)
    labels[:, -5:] = ids[:, -5:]
    model(ids, labels=labels).loss.backward()
    weight = model.get_input_embeddings().weight.grad
    return [bool(weight[chunk].any()) for chunk in ids[0].split(12)]


@pytest.mark.parametrize("every", EVERY)
def test_truncation_cuts_the_graph(every):
    model = tiny_comet("llama").train()
    assert reached(model, every) == [False] * 4 + [True] * 2
    model.activation_checkpointing_enable({"every": every})
    assert model.training_plan.truncate_after == 0


def test_truncation_is_the_same_recomputed_and_plain():
    model = tiny_comet("llama").train()
    model.training_plan = TrainingPlan(truncate_after=2)
    ids = batch_of(1, 70)
    plain = gradients(model, ids)[1]
    model.training_plan = TrainingPlan(Recomputation(every=3), truncate_after=2)
    got = gradients(model, ids)[1]
    for name, wanted in plain.items():
        assert error(got[name], wanted) < 1e-9, name


# --- what it costs ------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "runs"), [(1, 2), (3, 3)])
def test_how_often_a_chunk_is_run(monkeypatch, every, runs):
    model = tiny_comet("llama").train()
    model.activation_checkpointing_enable({"every": every})
    seen = []
    forward = Cell.forward
    monkeypatch.setattr(Cell, "forward", lambda self, *a: seen.append(self) or forward(self, *a))
    ids = batch_of(1, 72)
    loss = model(ids, labels=ids).loss
    assert len(seen) == 6 * 3  # chunks × layers
    loss.backward()
    assert len(seen) == runs * 6 * 3
    seen.clear()
    with torch.no_grad():
        model(ids, labels=ids)
    model.eval()(ids, labels=ids).loss.backward()
    assert len(seen) == 2 * 6 * 3  # nothing is recomputed where nothing was asked to be


def borders(monkeypatch, model, length):
    """Tensors of each border, as the forward pass of one step saves them."""
    kept = []
    forward = _Span.forward

    def noting(ctx, work, token, *border):
        kept.append(border)
        return forward(ctx, work, token, *border)

    monkeypatch.setattr(_Span, "forward", staticmethod(noting))
    ids = batch_of(1, length)
    model(ids, labels=ids).loss.backward()
    monkeypatch.undo()
    return kept


def test_a_border_holds_only_what_is_new(monkeypatch):
    """The FIFO's blocks are shared: bytes grow by a state and a chunk's entries a chunk."""
    model = tiny_comet("llama", capacity=9).train()
    model.activation_checkpointing_enable()
    kept = borders(monkeypatch, model, 120)
    assert len(kept) == 10
    found = [x.untyped_storage() for border in kept for x in border]
    storages = {storage.data_ptr(): storage.nbytes() for storage in found}
    wide = 8
    state = 3 * 32 * wide  # readout tokens × width
    entries = 3 * 16 * wide  # a chunk's compression tokens × width of a key and a value
    assert sum(storages.values()) == 9 * 3 * (state + entries)  # borders with memory × layers
    assert len(storages) == 9  # each in one block, so that it leaves no holes among activations


def test_every_third_border(monkeypatch):
    model = tiny_comet("llama").train()
    model.activation_checkpointing_enable({"every": 3})
    kept = borders(monkeypatch, model, 120)
    # Four spans; in the backward pass each chunk once more, but where a span is a single one.
    assert len(kept) == 4 + 9


def test_structures_are_kept_once():
    model = tiny_comet("llama", capacity=3)
    with torch.no_grad():
        caches = [model(batch_of(1, n), use_cache=True).past_key_values for n in (25, 37, 1)]
    run = _Run(None, None, None, None)
    first, same, other = (run.structure_of(cache.layers) for cache in caches)
    assert first is same
    assert other is not same
    assert first[0].memory.state == same[0].memory.state  # a plain truth, as dataclasses need it


def test_the_vault_copies_a_block_once():
    vault = _Vault()
    here = torch.ones(3)
    assert vault.put(here) is here  # it is on the CPU already

    class Elsewhere(torch.Tensor):
        device = torch.device("meta")

    block = torch.ones(3).as_subclass(Elsewhere)
    first = vault.put(block)
    assert vault.put(block) is first
    del block
    assert not vault._held


def test_offload_changes_nothing_on_a_cpu():
    model = tiny_comet("llama").train()
    ids = batch_of(1, 60)
    plain = gradients(model, ids)[1]
    model.activation_checkpointing_enable(offload=True)
    assert model.training_plan.recomputation.offload
    got = gradients(model, ids)[1]
    assert all(error(got[name], wanted) < 1e-9 for name, wanted in plain.items())


def test_a_graph_is_used_once():
    model = tiny_comet("llama").train()
    model.activation_checkpointing_enable()
    ids = batch_of(1, 40)
    loss = model(ids, labels=ids).loss
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("every", [1, 3])
def test_a_graph_that_is_kept_gives_the_same_again(every):
    model = tiny_comet("llama").train()
    model.activation_checkpointing_enable({"every": every})
    ids = batch_of(1, 60)
    loss = model(ids, labels=ids).loss
    loss.backward(retain_graph=True)
    once = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    loss.backward()
    for name, parameter in model.named_parameters():
        if name in once:
            assert error(parameter.grad, 2 * once[name]) < 1e-12, name


def test_gradients_of_some_parameters_only():
    model = tiny_comet("llama").train()
    model.activation_checkpointing_enable()
    ids = batch_of(1, 60)
    wanted = gradients(model, ids)[1]["model.comet.readout"]
    loss = model(ids, labels=ids).loss
    (got,) = torch.autograd.grad(loss, [model.model.comet.readout])
    assert error(got, wanted) < 1e-12


def test_hooks_of_a_parameter_fire_once_a_pass():
    model = tiny_comet("llama").train()
    model.activation_checkpointing_enable({"every": 2})
    fired = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(name))
    ids = batch_of(1, 60)
    model(ids, labels=ids).loss.backward()
    assert len(fired) == len(set(fired)) > 50


# --- switches -----------------------------------------------------------------------------------


def test_switches_of_transformers():
    model = tiny_comet("llama")
    assert not model.is_activation_checkpointing
    model.activation_checkpointing_enable(
        activation_checkpointing_kwargs={"use_reentrant": False}, every_n_layers=1, offload=False
    )
    assert model.is_activation_checkpointing
    assert model.model.is_activation_checkpointing
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"activation_checkpointing_kwargs": {"selective": True}}, "does not take selective"),
        ({"every_n_layers": 2}, "does not take every_n_layers=2"),
        (
            {"activation_checkpointing_kwargs": {"every": 0}},
            "every must be at least 1 chunk, got 0",
        ),
    ],
    ids=str,
)
def test_options_that_mean_nothing_here_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        tiny_comet("llama").activation_checkpointing_enable(**options)


def test_detached_models_keep_transformers_own():
    backbone = cometlm.detach(
        cometlm.attach(tiny_backbone("llama"), chunk_size=12, capacity=5, readout_tokens=3)
    ).train()
    getattr(backbone, f"{ACTIVATION_CHECKPOINTING}_enable")()
    ids = batch_of(1, 20)
    backbone(ids, labels=ids).loss.backward()
