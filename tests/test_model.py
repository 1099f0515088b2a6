"""What a user of the model meets: refusals, losses, caches, budgets, dtypes, offloading."""

import re

import accelerate
import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache

import cometlm
from cometlm import CometConfig
from tests.tiny import error, random_ids, scramble, tiny_backbone, tiny_comet

SMALL = {"chunk_size": 12, "readout_tokens": 3, "stride": 4, "capacity": 5, "rank": 2}


def refused(said):
    return pytest.raises(ValueError, match=re.escape(said))


def batch_of(count, length):
    return torch.stack([random_ids(length, seed=b) for b in range(count)])


# --- bad input ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    """Not to be changed."""
    return tiny_comet("qwen3")


@pytest.mark.parametrize("shape", [(1, 0), (0, 3), (3,), (1, 2, 3)], ids=str)
def test_ids_must_be_a_batch_of_tokens(model, shape):
    ids = torch.ones(shape, dtype=torch.long)
    said = f"input_ids must be [batch, tokens] with at least one of each, got shape {shape}"
    with refused(said):
        model(ids)
    with refused(said):
        model(ids, labels=ids)


@pytest.mark.parametrize("bad", [-1, -100, 96, 5000])
def test_ids_must_be_in_the_vocabulary(model, bad):
    ids = random_ids(20)[None]
    ids[0, 13] = bad
    with refused(f"input_ids must lie in 0 … 95 (the vocabulary), got {bad}"):
        model(ids)


def test_ids_under_padding_may_be_anything(model):
    ids, mask = random_ids(20)[None], torch.ones(1, 20)
    ids[0, :3], mask[0, :3] = -100, 0
    with torch.no_grad():
        got = model(ids, attention_mask=mask).logits[:, 3:]
        assert error(got, model(ids[:, 3:]).logits) < 1e-12


def test_labels_must_have_the_shape_of_ids(model):
    with refused("labels have shape (1, 9) but input_ids (1, 10); they must be the same"):
        model(random_ids(10)[None], labels=random_ids(9)[None])


@pytest.mark.parametrize("shape", [(2, 9), (1, 10), (3, 10), (10,), (2, 1, 1, 10)], ids=str)
def test_mask_must_have_the_shape_of_ids(model, shape):
    with refused(
        "attention_mask must be [2, 10] like input_ids (or longer, with the past in front), "
        f"got shape {shape}"
    ):
        model(batch_of(2, 10), attention_mask=torch.ones(shape))


def test_mask_must_not_have_holes(model):
    mask = torch.ones(2, 10)
    mask[1, 4] = 0
    with refused(
        "attention_mask has a hole in row 1: ones must be contiguous, with padding on the left or "
        "on the right"
    ):
        model(batch_of(2, 10), attention_mask=mask)


def test_mask_must_have_ones(model):
    with refused("attention_mask has no ones: there is no text to read"):
        model(batch_of(2, 10), attention_mask=torch.zeros(2, 10))


def test_cache_must_be_this_models(model):
    ids = random_ids(10)[None]
    with refused("past_key_values must be a CometCache that this model returned, got DynamicCache"):
        model(ids, past_key_values=DynamicCache())
    with torch.no_grad():
        cache = model(ids).past_key_values
    with refused(
        "past_key_values holds 1 rows and 3 layers, but input_ids has 2 rows and the model 3 layers"
    ):
        model(batch_of(2, 10), past_key_values=cache)


@pytest.mark.parametrize(
    ("name", "value"),
    [("token_type_ids", torch.zeros(1, 10)), ("output_attentions", True), ("chunk_size", 8)],
)
def test_unknown_arguments_are_refused_not_ignored(model, name, value):
    shown = name if isinstance(value, torch.Tensor) else f"{name}={value!r}"
    with refused(f"forward() does not take {shown}"):
        model(random_ids(10)[None], **{name: value})


def test_what_transformers_always_passes_is_taken(model):
    ids = random_ids(10)[None]
    with torch.no_grad():
        out = model(ids, return_dict=True, output_attentions=False, position_ids=None)
        assert torch.equal(out.logits, model(ids).logits)


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"capacity": -3}, "capacity must be at least 1, got -3"),
        ({"stride": 2.0}, "stride must be an integer of at least 1, got 2.0"),
        ({"capacity": True}, "capacity must be an integer of at least 1, got True"),
    ],
    ids=str,
)
def test_bad_budgets(model, budget, said):
    with refused(said):
        model(random_ids(10)[None], **budget)


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"stride": 1}, "chunk 125 + compression tokens 125 + readout 3 = 261 positions"),
        ({"capacity": 110}, "temporary memory 110 + chunk 125 + compression tokens 16"),
    ],
    ids=str,
)
def test_budgets_that_exceed_the_positions(budget, said):
    model = tiny_comet("qwen3", chunk_size=125, stride=8)
    ids = random_ids(10)[None]
    with refused(said) as raised:
        model(ids, **budget)
    assert "max_position_embeddings=256" in str(raised.value)
    model(ids, stride=4, capacity=7)


def test_attach_refuses_a_chunk_that_exceeds_the_positions():
    backbone = tiny_backbone("qwen3")
    before = backbone.config._attn_implementation
    with refused(
        "chunk_size=240 is too large for this backbone: global memory 3 + temporary memory 5 + "
        "chunk 240 + compression tokens 60 + readout 3 = 311 positions, but the backbone has "
        "max_position_embeddings=256"
    ):
        cometlm.attach(backbone, **{**SMALL, "chunk_size": 240})
    assert backbone.config._attn_implementation == before
    cometlm.attach(backbone, **SMALL)  # the refusal left the backbone as it was


def test_attach_refuses_unknown_fields_and_bad_sizes():
    backbone = tiny_backbone("qwen3")
    with refused("unknown CometConfig field 'chunk'; it has chunk_size, readout_tokens, stride"):
        cometlm.attach(backbone, chunk=12)
    with refused("stride must be at least 1, got 0"):
        cometlm.attach(backbone, CometConfig(**SMALL), stride=0)


def test_attach_twice():
    backbone = tiny_backbone("qwen3")
    model = cometlm.attach(backbone, **SMALL)
    with refused("Qwen3ForCausalLM already has a memory; detach() it first"):
        cometlm.attach(backbone, **SMALL)
    cometlm.detach(model)
    cometlm.attach(backbone, **SMALL)


# --- NaN ------------------------------------------------------------------------------------

ONLY_TEMPORARY, ONLY_GLOBAL = {"global_memory": False}, {"temporary_memory": False}


@pytest.mark.parametrize("family", ["qwen3", "llama"])  # llama packs its entries
@pytest.mark.parametrize(
    ("weight", "value", "sizes", "chunk"),
    [
        ("global_memory.norm.weight", torch.nan, {}, 0),
        ("global_memory.norm.weight", torch.inf, ONLY_GLOBAL, 0),
        ("global_memory.gate", torch.nan, {}, 1),  # the first fold has no gate
        # Through the slots of the next chunk.
        ("global_memory.adapter.up", torch.nan, {}, 1),
        ("temporary_memory.norm.weight", torch.inf, {}, 0),
        ("temporary_memory.adapter.down", torch.nan, ONLY_TEMPORARY, 0),
    ],
)
@torch.no_grad()
def test_memory_that_is_not_finite_names_layer_and_chunk(family, weight, value, sizes, chunk):
    model = tiny_comet(family, **sizes)
    broken = model.model.comet.layers[1].get_parameter(weight)
    healthy = broken.clone()
    broken.flatten()[0] = value
    said = f"the memory of layer 1 is not finite (NaN or infinite) after chunk {chunk};"
    with pytest.raises(FloatingPointError, match=re.escape(said)):
        model(random_ids(43)[None])
    broken.copy_(healthy)
    model(random_ids(43)[None])


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@torch.no_grad()
def test_an_error_leaves_the_cache_as_it_was(family):
    model = tiny_comet(family)
    ids = random_ids(60)[None]
    cache = model(ids[:, :30]).past_key_values  # two chunks folded, six tokens in the third
    want = model(ids[:, 30:], past_key_values=cache)
    weight = model.model.comet.layers[1].global_memory.norm.weight
    healthy = weight.clone()
    weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"layer 1 .* after chunk 2"):
        model(ids[:, 30:], past_key_values=cache)
    weight.copy_(healthy)
    again = model(ids[:, 30:], past_key_values=cache)
    assert torch.equal(again.logits, want.logits)
    assert cache.rows[0].tokens == 30


# --- loss -----------------------------------------------------------------------------------


def plain_loss(model, rows, labels, count=None):
    """Cross-entropy of each row alone, shifted by one over its whole text."""
    total, counted = 0, 0
    for row, wanted in zip(rows, labels, strict=True):
        logits = model(row[None]).logits[0, :-1]
        total = total + F.cross_entropy(logits, wanted[1:], reduction="sum", ignore_index=-100)
        counted += int((wanted[1:] != -100).sum())
    return total / (counted if count is None else count)


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.model.comet.parameters()))


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
@pytest.mark.parametrize("length", [2, 12, 13, 24, 25, 43])
def test_loss_is_shifted_over_the_whole_text(family, length):
    model = tiny_comet(family)
    ids = batch_of(2, length)
    want = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    got = model(ids, labels=ids).loss
    assert got.shape == ()
    assert error(got, want) < 1e-12
    with torch.no_grad():
        assert error(model(ids, labels=ids).loss, want) < 1e-12


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_of_padded_labels(side):
    model = tiny_comet("qwen3")
    lengths = [43, 1, 12, 25]
    rows = [random_ids(n, seed=n) for n in lengths]
    labels = [random_ids(n, seed=50 + n) for n in lengths]  # not the ids: both are looked at
    for wanted in labels:
        wanted[3::5] = -100
    ids, padded = torch.full((4, 43), 7), torch.full((4, 43), 9)  # no -100 at padding
    mask = torch.zeros(4, 43, dtype=torch.long)
    for b, n in enumerate(lengths):
        where = slice(43 - n, 43) if side == "left" else slice(0, n)
        ids[b, where], padded[b, where], mask[b, where] = rows[b], labels[b], 1
    want = plain_loss(model, rows, labels)
    got = model(ids, attention_mask=mask, labels=padded).loss
    assert error(got, want) < 1e-9  # padded batches sum in another order
    for ours, theirs in zip(gradients(model, got), gradients(model, want), strict=True):
        assert error(ours, theirs) < 1e-5  # transformers' norms are float32
    for count in (7, torch.tensor(7)):
        got = model(ids, attention_mask=mask, labels=padded, num_items_in_batch=count).loss
        assert error(got, plain_loss(model, rows, labels, count=7)) < 1e-9


def test_first_label_of_a_continuation_is_not_counted():
    """Its logits were the last call's."""
    model = tiny_comet("qwen3")
    ids = random_ids(30)[None]
    whole = model(ids).logits
    cache = model(ids[:, :17]).past_key_values
    got = model(ids[:, 17:], past_key_values=cache, labels=ids[:, 17:]).loss
    assert error(got, F.cross_entropy(whole[0, 17:-1], ids[0, 18:])) < 1e-6


def test_loss_holds_the_logits_of_one_chunk():
    model = tiny_comet("qwen3")
    ids = batch_of(2, 43)
    seen, saved = [], []
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))

    def save(x):
        saved.append(tuple(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        out = model(ids, labels=ids)
    assert out.logits is None
    assert seen == [24, 24, 24, 12]  # the last token of each row has no label
    assert not any(96 in shape[1:] for shape in saved)  # the vocabulary, but for the head's weight
    out.loss.backward()
    assert max(seen) == 24
    assert sum(seen) == 2 * 84
    seen.clear()
    with torch.no_grad():
        model(ids, labels=ids)
    assert seen == [24, 24, 24, 12]  # the last token of each row has no label


def test_logits_to_keep(model):
    ids = batch_of(2, 30)
    with torch.no_grad():
        whole = model(ids).logits
        assert whole.shape == (2, 30, 96)
        assert model(ids, labels=ids).logits is None
        for keep, where in [
            (0, slice(None)),
            (1, slice(29, None)),
            (13, slice(17, None)),
            (99, slice(None)),
            (torch.tensor([0, 11, 12, 29]), torch.tensor([0, 11, 12, 29])),
        ]:
            assert error(model(ids, logits_to_keep=keep).logits, whole[:, where]) < 1e-12
            out = model(ids, labels=ids, logits_to_keep=keep)
            assert error(out.logits, whole[:, where]) < 1e-12
            assert out.loss is not None


# --- caches ---------------------------------------------------------------------------------


def test_when_there_is_a_cache():
    model = tiny_comet("qwen3")
    ids = random_ids(20)[None]
    assert model(ids).past_key_values.tokens_read == 20
    assert model(ids, use_cache=False).past_key_values is None
    model.train()
    assert model(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values.tokens_read == 20
    model.eval()
    model.config.use_cache = False
    assert model(ids).past_key_values is None


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("first", [5, 12, 30])
@torch.no_grad()
def test_a_cache_is_a_value(family, first):
    """Continuations of one cache do not know of each other."""
    model = tiny_comet(family)
    start = random_ids(first)
    cache = model(start[None]).past_key_values
    tails = [random_ids(n, seed=n) for n in (20, 1, 33)]
    for tail in [*tails, *tails]:
        want = model(torch.cat([start, tail])[None]).logits[0, first:]
        out = model(tail[None], past_key_values=cache)
        assert error(out.logits[0], want) < 1e-6
        assert out.past_key_values.tokens_read == first + len(tail)
    assert (cache.tokens_read, cache.chunks_folded) == (first, (first - 1) // 12)


def storage_bytes(cache):
    """Bytes of all storages that a cache keeps alive, which views can make more than `nbytes`."""
    tensors = []
    for layer in cache.layers:
        tensors += [layer.memory.state, *layer.memory.entries]
        if layer.open is not None:
            tensors += [*layer.open.chunk, *(layer.open.memory or ()), *layer.open.pending]
    storages = [x.untyped_storage() for x in tensors if x is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("sizes", [{}, {"stride": 1}, {"global_memory": False}], ids=str)
@pytest.mark.parametrize("feed", [12, 3])
@torch.no_grad()
def test_cache_is_constant_once_the_memory_is_full(family, sizes, feed):
    model = tiny_comet(family, **sizes)
    cache, held, stored = None, [], []
    for t in range(20):
        for piece in random_ids(12, seed=t).split(feed):
            cache = model(piece[None], past_key_values=cache).past_key_values
        held.append(cache.nbytes)
        stored.append(storage_bytes(cache))
    assert cache.chunks_folded == 19
    assert held[0] < held[3]
    assert len(set(held[3:])) == 1
    assert len(set(stored[4:])) == 1
    closed = model(random_ids(12)[None], past_key_values=cache, more_text=True).past_key_values
    rows = (0 if sizes.get("global_memory") is False else 3) * 32
    packed = 2 * 1 * 8 if family == "llama" else 32  # one key and one value of width 8
    assert closed.nbytes == 3 * 8 * (rows + 5 * packed)


# --- budgets --------------------------------------------------------------------------------


def entries_of(cache):
    return [torch.cat(layer.memory.entries, 1) for layer in cache.layers]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@torch.no_grad()
def test_smaller_capacity_shrinks_the_memory_at_the_next_fold(family):
    model = tiny_comet(family)
    ids = random_ids(60)[None]
    cache = model(ids[:, :25]).past_key_values
    assert cache.rows[0].entries == 5
    out = model(ids[:, 25:30], past_key_values=cache, capacity=2)
    plain = model(ids[:, 25:30], past_key_values=cache)
    assert out.past_key_values.rows[0].entries == 5
    assert error(out.logits, plain.logits) < 1e-6
    shrunk = model(ids[:, 30:37], past_key_values=out.past_key_values, capacity=2)
    kept = model(ids[:, 30:37], past_key_values=plain.past_key_values)
    assert error(shrunk.logits[:, :6], kept.logits[:, :6]) < 1e-6  # the chunk before the fold
    assert error(shrunk.logits[:, 6], kept.logits[:, 6]) > 1e-3
    assert shrunk.past_key_values.rows[0].entries == 2
    fewer, more = entries_of(shrunk.past_key_values), entries_of(kept.past_key_values)
    for few, many in zip(fewer, more, strict=True):
        assert few.shape[1] == 2
        assert error(few, many[:, -2:]) < 1e-6
    # Back to the config's capacity: it grows again, by three a chunk.
    grown = model(ids[:, 37:50], past_key_values=shrunk.past_key_values)
    assert grown.past_key_values.rows[0].entries == 5
    assert [x.shape[1] for x in entries_of(grown.past_key_values)] == [5] * 3


@torch.no_grad()
def test_capacity_does_not_count_before_the_next_fold():
    """A large memory and then a small stride: a row longer than either budget's longest."""
    model = tiny_comet("qwen3", chunk_size=8, readout_tokens=1, stride=4, capacity=12)
    ids = random_ids(64)[None]
    cache = model(ids[:, :56], more_text=True).past_key_values
    assert cache.rows[0].entries == 12
    want = model(ids[:, 56:], past_key_values=cache, stride=1, capacity=12).logits
    got = model(ids[:, 56:], past_key_values=cache, stride=1, capacity=1).logits
    assert error(got, want) < 1e-6


@torch.no_grad()
def test_changing_the_budget_often_does_not_grow_the_tables():
    model = tiny_comet("qwen3")
    cache = None
    for t in range(30):
        budget = {"stride": 2} if t % 2 else {}
        cache = model(random_ids(5, seed=t)[None], past_key_values=cache, **budget).past_key_values
    assert cache.reach <= 3 + 5 + 12 + 12 + 3  # a compression token after every text token


# --- dtypes, modes, parameters --------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma3_text"])
def test_other_dtypes(family, dtype):
    model = cometlm.attach(tiny_backbone(family).to(dtype), **SMALL)
    scramble(model.model.comet, 0.5)
    assert {p.dtype for p in model.parameters()} == {dtype}
    ids, mask = batch_of(2, 43), torch.ones(2, 43)
    mask[1, :20] = 0
    for given in (None, mask):
        out = model(ids, attention_mask=given, labels=ids, logits_to_keep=0)
        assert out.logits.dtype == dtype
        assert out.logits.isfinite().all()
        assert out.loss.dtype == torch.float32
        out.loss.backward()
        assert all(p.grad.isfinite().all() for p in model.model.comet.parameters())
    with torch.no_grad():
        cache = model(ids).past_key_values
        step = model(ids[:, :1], past_key_values=cache)
    assert step.logits.dtype == dtype
    assert step.logits.isfinite().all()


@pytest.mark.parametrize("training", [True, False])
def test_attach_keeps_the_mode(training):
    backbone = tiny_backbone("qwen3").train(training)
    model = cometlm.attach(backbone, **SMALL)
    assert {module.training for module in model.modules()} == {training}
    assert {module.training for module in cometlm.detach(model).modules()} == {training}


@pytest.mark.parametrize("frozen", ["all", "some", "none"])
def test_attach_keeps_what_requires_grad(frozen):
    backbone = tiny_backbone("qwen3")
    backbone.requires_grad_(frozen != "all")
    backbone.model.layers[1].requires_grad_(frozen == "none")
    before = {id(p): p.requires_grad for p in backbone.parameters()}
    model = cometlm.attach(backbone, **SMALL)
    new = [p for p in model.parameters() if id(p) not in before]
    assert {id(p): p.requires_grad for p in backbone.parameters()} == before
    assert {id(p) for p in model.parameters()} == {*before, *map(id, new)}
    assert {id(p) for p in new} == {id(p) for p in model.model.comet.parameters()}
    assert all(p.requires_grad for p in new)
    ids = random_ids(43)[None]
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in new)
    assert all((p.grad is not None) == before[id(p)] for p in backbone.parameters())


def test_number_of_new_parameters():
    backbone = tiny_backbone("qwen3")
    before = sum(p.numel() for p in backbone.parameters())
    model = cometlm.attach(backbone, **SMALL)
    width, rank, readouts, layers = 32, 2, 3, 3
    norm, gate, adapter = width, 2 * width, 2 * width * rank
    memory = layers * (norm + gate + adapter + norm + adapter) + (readouts + 1) * width
    assert model.num_parameters() - before == memory


# --- weights that are elsewhere, or not tied ------------------------------------------------


def partly_on_disk(backbone, folder):
    places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm"), "cpu")
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"}
    places |= {"lm_head": "cpu"}
    return accelerate.dispatch_model(backbone, places, main_device="cpu", offload_dir=folder)


def all_on_disk(backbone, folder):
    return accelerate.disk_offload(backbone, folder, execution_device=torch.device("cpu"))


def all_offloaded(backbone, folder):
    return accelerate.cpu_offload(backbone, execution_device=torch.device("cpu"))


def embedding_on_disk(backbone, folder):
    places = dict.fromkeys(("model.layers", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
    places |= {"model.embed_tokens": "disk"}
    return accelerate.dispatch_model(backbone, places, main_device="cpu", offload_dir=folder)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3_text"])  # packed, fused, tied
@pytest.mark.parametrize("offload", [partly_on_disk, all_on_disk, all_offloaded, embedding_on_disk])
@torch.no_grad()
def test_offloaded_backbone(family, offload, tmp_path):
    ids = batch_of(2, 30)
    plain = tiny_comet(family)
    backbone = offload(tiny_backbone(family), tmp_path)
    alone = tiny_backbone(family)(ids).logits
    assert any(p.device.type == "meta" for p in backbone.parameters()) or offload is (
        embedding_on_disk  # tied: accelerate puts it where the head is
    )
    assert error(backbone(ids).logits, alone) < 1e-12
    model = cometlm.attach(backbone, **SMALL)
    for mine, theirs in zip(
        model.model.comet.parameters(), plain.model.comet.parameters(), strict=True
    ):
        mine.copy_(theirs)
    assert error(model(ids).logits, plain(ids).logits) < 1e-12
    cache = model(ids[:, :17]).past_key_values
    rest = model(ids[:, 17:], past_key_values=cache).logits
    assert error(rest, plain(ids).logits[:, 17:]) < 1e-6
    assert error(cometlm.detach(model)(ids).logits, alone) < 1e-12


@torch.no_grad()
def test_attach_does_not_tie_what_the_backbone_has_not_tied():
    """As transformers leaves a checkpoint with two weights and a config that says tied."""
    backbone = tiny_backbone("qwen3", tie_word_embeddings=True)
    head = torch.nn.Parameter(torch.randn(96, 32, dtype=torch.float64))
    backbone.lm_head.weight = head
    ids = random_ids(20)[None]
    before = backbone(ids).logits
    model = cometlm.attach(backbone, **SMALL)
    assert backbone.lm_head.weight is head
    assert torch.equal(cometlm.detach(model)(ids).logits, before)


@pytest.mark.slow
def test_compiled_cells_give_the_same_numbers():
    model = tiny_comet("llama").float()
    ids = batch_of(1, 43)
    wanted = model(ids, labels=ids).loss
    (gradient,) = torch.autograd.grad(wanted, [model.model.comet.readout])
    assert model.model.compile_cells()
    got = model(ids, labels=ids).loss
    torch.testing.assert_close(got, wanted)
    (own,) = torch.autograd.grad(got, [model.model.comet.readout])
    torch.testing.assert_close(own, gradient, rtol=1e-4, atol=1e-5)
    assert all(p.grad is None for p in model.parameters())


def test_a_last_chunk_of_another_length_compiles_nothing_new():
    """Once lengths have differed, each further one would cost a training step its seconds."""
    torch._dynamo.reset()
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = tiny_comet("llama", chunk_size=40)
    assert model.model.compile_cells(backend=counted)
    for last in (5, 38, 9):
        model(batch_of(1, 80 + last))
    settled = len(graphs)
    for last in (13, 18, 22, 27, 35):
        model(batch_of(1, 80 + last))
    assert len(graphs) == settled > 0


def test_cells_that_do_not_compile_stay_as_they_were():
    model = tiny_comet("llama")
    ids = batch_of(1, 43)
    wanted = model(ids).logits

    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    with pytest.warns(UserWarning, match=r"stay uncompiled, .*no compiler here"):
        assert not model.model.compile_cells(backend=broken)
    assert torch.equal(model(ids).logits, wanted)
