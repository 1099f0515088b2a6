"""transformers' `generate()` over a memory: every mode equals the argmax of full forwards."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import StoppingCriteria, StoppingCriteriaList

from cometlm.core.reference import reference_generate
from tests.tiny import FAMILIES, GOLDEN, error, examples, load_golden, random_ids, tiny_comet

# Golden files without generated ids pin logits only.
written = pytest.mark.parametrize(
    "path",
    [p for p in GOLDEN if p.stem not in ("global_only", "temporary_only")],
    ids=lambda path: path.stem,
)


def greedy(model, ids, count, **options):
    """The generated part, without end-of-text and with every token of the prompt real."""
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, **options}
    out = model.generate(ids, max_new_tokens=count, eos_token_id=None, pad_token_id=0, **options)
    return out[:, ids.shape[1] :]


@written
@pytest.mark.parametrize("options", [{}, {"num_beams": 1}, {"use_cache": False}], ids=str)
def test_golden(path, options):
    model, want, _ = load_golden(path)
    ids = want["generated_ids"].tolist()
    assert greedy(model, want["input_ids"][None], len(ids), **options)[0].tolist() == ids


@written
def test_golden_in_a_ragged_batch(path):
    model, want, _ = load_golden(path)
    prompt, ids = want["input_ids"], want["generated_ids"].tolist()
    lengths = [len(prompt), 1, len(prompt) // 2, len(prompt)]
    width = len(prompt) + 3
    batch, mask = torch.zeros(2, len(lengths), width, dtype=torch.long)
    for b, n in enumerate(lengths):
        batch[b, width - n :], mask[b, width - n :] = prompt[:n], 1
    got = greedy(model, batch, len(ids), attention_mask=mask).tolist()
    assert got[0] == got[3] == ids
    assert got[1] == reference_generate(model, prompt[:1], len(ids))
    assert got[2] == reference_generate(model, prompt[: len(prompt) // 2], len(ids))


@written
def test_golden_from_a_cache_that_has_read(path):
    model, want, _ = load_golden(path)
    prompt, ids = want["input_ids"][None], want["generated_ids"].tolist()
    for cut in {1, prompt.shape[1] // 2, prompt.shape[1] - 1}:
        cache = model(prompt[:, :cut]).past_key_values
        assert greedy(model, prompt[:, cut:], len(ids), past_key_values=cache)[0].tolist() == ids
        assert cache.tokens_read == cut  # a value: generating left it as it was


def test_reserved_rows_are_never_generated():
    model, want, _ = load_golden(next(p for p in GOLDEN if p.stem == "both_memories"))
    first = int(greedy(model, want["input_ids"][None], 1))
    model.config.suppressed_tokens = [*model.config.suppressed_tokens, first]
    for options in ({}, {"do_sample": True, "top_k": 1}, {"suppress_tokens": [5]}):
        assert first not in greedy(model, want["input_ids"][None], 8, **options)[0].tolist()


@examples(25)
@given(
    st.sampled_from(sorted(FAMILIES)),
    st.integers(1, 30),
    st.integers(1, 14),
    st.integers(1, 9),
    st.integers(1, 6),
    st.integers(1, 30),
)
def test_chunks_close_while_decoding(family, length, count, chunk_size, stride, cut):
    """A full chunk folds into memory and the next begins, wherever the prompt ended."""
    model = tiny_comet(family, chunk_size=chunk_size, stride=stride)
    prompt = random_ids(length)
    want = reference_generate(model, prompt, count)
    assert greedy(model, prompt[None], count)[0].tolist() == want
    if cut < length:
        cache = model(prompt[None, :cut]).past_key_values
        got = greedy(model, prompt[None, cut:], count, past_key_values=cache)
        assert got[0].tolist() == want


def test_a_step_runs_no_more_items_than_it_must():
    """Compression tokens ride along with the text token before them."""
    model = tiny_comet("qwen3", chunk_size=12, stride=4)
    seen = []
    model.model.cells[0].layer.register_forward_hook(
        lambda module, args, out: seen.append(args[0].shape[1])
    )
    greedy(model, random_ids(1)[None], 26)
    #            prompt, then one text token a step; every fourth brings its compression token
    chunk = [1, 1, 1, 2] * 3
    readout = [3]  # a closed chunk's readout tokens; no compression token is left over
    assert seen == (chunk + readout) * 2 + [1, 1]


def beam_search(model, prompt, count, beams):
    """Beam search written out over full forwards: sums of log-probabilities, best first."""
    running = [(0.0, [])]
    for _ in range(count):
        grown = []
        for score, ids in running:
            logits = model(torch.cat([prompt, prompt.new_tensor(ids)])[None]).logits[0, -1]
            for token, more in enumerate(logits.float().log_softmax(-1).tolist()):
                grown.append((score + more, [*ids, token]))
        running = sorted(grown, reverse=True)[:beams]
    return running[0][1]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("length", [5, 11, 23])
def test_beam_search(family, length):
    """Beams fork the memory, also across chunk borders."""
    model = tiny_comet(family)
    prompt = random_ids(length)
    with torch.no_grad():
        want = beam_search(model, prompt, 6, beams=3)
    assert greedy(model, prompt[None], 6, num_beams=3)[0].tolist() == want


def test_beams_and_copies_of_a_batch_from_a_cache():
    model = tiny_comet("qwen3")
    prompts = torch.stack([random_ids(20), random_ids(20, seed=1)])
    cache = model(prompts[:, :15]).past_key_values
    options = {"num_beams": 3, "num_return_sequences": 2}
    got = greedy(model, prompts[:, 15:], 5, past_key_values=cache, **options)
    assert torch.equal(got, greedy(model, prompts, 5, **options))
    torch.manual_seed(0)
    sampled = {"do_sample": True, "num_return_sequences": 3, "num_beams": 1}
    got = greedy(model, prompts[:, 15:], 5, past_key_values=cache, **sampled)
    torch.manual_seed(0)
    assert torch.equal(got, greedy(model, prompts, 5, **sampled))


def test_select_gives_the_rows_alone():
    """Rows of a ragged batch, taken out, doubled and turned round, go on as they would alone."""
    model = tiny_comet("llama", chunk_size=6, readout_tokens=2, stride=4, capacity=3)
    lengths = [1, 5, 6, 7, 14, 40]
    ids = torch.zeros(len(lengths), 40, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for b, n in enumerate(lengths):
        ids[b, 40 - n :], mask[b, 40 - n :] = random_ids(n, seed=b), 1
    cache = model(ids, attention_mask=mask).past_key_values
    more = random_ids(9, seed=99)
    for rows in ([0], [5, 0], [1, 1], [2, 3], [0, 1], [4, 3, 2, 1], [0, 5, 5]):
        taken = cache.select(rows)
        logits = model(more.expand(len(rows), -1), past_key_values=taken).logits
        for got, b in zip(logits, rows, strict=True):
            alone = torch.cat([random_ids(lengths[b], seed=b), more])
            assert error(got, model(alone[None]).logits[0, -9:]) < 1e-6
    with pytest.raises(ValueError, match="row must lie in 0 … 5, got 6"):
        cache.select([6])


def test_chunked_prefill_and_returned_dict():
    model = tiny_comet("qwen3")
    prompt = random_ids(30)[None]
    out = model.generate(
        prompt,
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=None,
        prefill_chunk_size=7,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert torch.equal(out.sequences[:, 30:], greedy(model, prompt, 4))
    full = model(out.sequences[:, :-1]).logits[0, -4:]
    assert error(torch.stack(out.logits)[:, 0].double(), full) < 1e-6
    # All but the last generated token have been read, and they are what the cache's length counts.
    assert out.past_key_values.get_seq_length() == out.past_key_values.tokens_read == 33
    again = greedy(model, out.sequences[:, -1:], 5, past_key_values=out.past_key_values)
    assert torch.equal(again, greedy(model, out.sequences, 5))


def test_stopping_streaming_and_budget():
    class After(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([input_ids.shape[1] >= 33])

    class Listener:
        def __init__(self):
            self.heard, self.ended = [], False

        def put(self, ids):
            self.heard += ids.flatten().tolist()

        def end(self):
            self.ended = True

    model, prompt, listener = tiny_comet("qwen3"), random_ids(30)[None], Listener()
    stop = StoppingCriteriaList([After()])
    got = greedy(model, prompt, 9, stopping_criteria=stop, streamer=listener)
    assert got.shape[1] == 3
    assert listener.heard == [*prompt[0].tolist(), *got[0].tolist()]
    assert listener.ended
    budget = greedy(model, prompt, 6, stride=2, capacity=3)[0].tolist()
    ids = prompt[0].tolist()
    for token in budget:
        logits = model(torch.tensor([ids]), stride=2, capacity=3).logits
        assert token == int(logits[0, -1].argmax())
        ids.append(token)


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_prompts_are_never_too_long():
    """The backbone's positions bound a row, not the text: no warning and no cut."""
    model = tiny_comet("llama", chunk_size=12)
    prompt = random_ids(3 * model.config.backbone_config.max_position_embeddings)[None]
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), eos_token_id=None)
    assert out.shape[1] == prompt.shape[1] + 20  # transformers' own default


def test_memory_is_flat_while_generating():
    model = tiny_comet("qwen3")
    held = set()
    ids, cache = random_ids(60)[None], None
    for step in range(120):
        out = model(ids, past_key_values=cache, logits_to_keep=1)
        cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        if step >= 24:
            held.add((cache.rows[0].items, cache.nbytes))
    assert len(held) == 12  # one size for every fill of the open chunk, however often it was filled


def test_a_long_prompt_holds_hidden_states_of_its_end_only():
    model = tiny_comet("qwen3")
    shapes = []
    model.model.norm.register_forward_hook(lambda m, args, out: shapes.append(out.shape[1]))
    greedy(model, random_ids(200)[None], 1)
    assert sum(shapes) <= 2 * 12


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompt_lookup_num_tokens": 2}, "not supported with stateful models"),
        ({"cache_implementation": "dynamic"}, "the memory is the cache"),
        ({"max_new_token": 3}, "max_new_token"),
        ({"output_attentions": True}, "output_attentions"),
        ({"past_key_values": "text"}, "CometCache"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_what_cannot_be_done_is_said(options, said):
    model = tiny_comet("qwen3")
    with pytest.raises(ValueError, match=said):
        model.generate(random_ids(5)[None], **{"max_new_tokens": 2, **options})


def test_a_cache_of_another_batch_is_refused():
    model = tiny_comet("qwen3")
    cache = model(torch.stack([random_ids(5)] * 3)).past_key_values
    with pytest.raises(ValueError, match="3 rows"):
        model.generate(random_ids(5)[None], past_key_values=cache, max_new_tokens=2)
