"""Sessions that look on: the same reading, and explanations that add up."""

import pytest
import torch

import cometlm
from cometlm import Session
from cometlm.inspection import InspectedSession
from cometlm.tasks import make_task
from tests.sessions import GREEDY, TEXT, assert_same, model_of, read_at_random, tokenizer_of
from tests.tiny import random_ids, refused, tiny_comet

KINDS = ["llama", "qwen3", "no global", "no temporary", "no gate", "overlap", "bfloat16"]
ASKED = {**GREEDY, "max_new_tokens": 4}


def pair(kind):
    return [one(model_of(kind), tokenizer_of(kind)) for one in (InspectedSession, Session)]


@pytest.mark.parametrize("kind", KINDS)
def test_it_reads_as_a_session_does(kind):
    ours, plain = pair(kind)
    for session in (ours, plain):
        read_at_random(session, seed=3)
        session.read(TEXT)
        list(session.finish())
    assert_same(ours, plain)
    assert ours.history.chunks == ours.stats().chunks > 20
    rows = ours._cache.rows[0]
    assert len(ours.history.entries) == rows.entries
    overlap = ours.model.config.comet_config.overlap
    assert ours.history.end + len(ours._open) - overlap == ours.stats().tokens


@pytest.mark.parametrize("kind", KINDS)
def test_explanations_add_up(kind):
    ours, plain = pair(kind)
    for session in (ours, plain):
        session.read(TEXT)
    before = ours.stats(), ours.history
    found = ours.explain("Who wrote?", template=False, **ASKED)
    assert found.answer == plain.ask("Who wrote?", template=False, **ASKED)
    assert (ours.stats(), ours.history) == before
    assert len(found.answer_ids) <= found.num_answer_tokens == 4
    sums = found.parts.sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=1e-4, atol=1e-4)
    of_token = found.parts.mean((0, 1))  # [A, P]
    near = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found.entries.sum(-1), of_token[:, 1], **near)
    if kind != "no global":
        torch.testing.assert_close(found.passages.sum(-1), of_token[:, 0], **near)
        by_head = found.passages_by_head.sum(-1)
        torch.testing.assert_close(by_head, found.parts.mean(2)[..., 0], **near)
        torch.testing.assert_close(
            found.other_passages.sum(), found.other_parts.mean((0, 1))[0], **near
        )
    memory = of_token[:, :2].sum(-1).mean()
    torch.testing.assert_close(found.traced.sum(), memory, **near)
    assert found.chunk.shape[1] == len(found.open_ids) + len(found.answer_ids) - 1
    torch.testing.assert_close(found.chunk[:, 0], of_token[:, 2], **near)
    assert (found.chunk.sum(-1) <= of_token[:, 2:].sum(-1) + 1e-5).all()


def test_an_answers_tokens_look_from_where_they_are_said():
    """The last token of the question says the first one, and nothing sees what follows it."""
    session = InspectedSession(model_of("llama"), tokenizer_of("llama"))
    session.read(TEXT[:300])
    found = session.explain("Who?", answer=" wind and sea", template=False)
    count = len(found.answer_ids)
    assert count > 1
    for i, row in enumerate(found.chunk):
        seen = len(found.open_ids) + i
        assert (row[:seen] > 0).all()
        assert (row[seen:] == 0).all()


def test_an_answer_is_explained_up_to_the_end_of_its_chunk():
    session = InspectedSession(model_of("llama"), tokenizer_of("llama"))
    session.read(TEXT)
    found = session.explain("And?", template=False, **{**GREEDY, "max_new_tokens": 40})
    assert found.num_answer_tokens == 40
    assert len(found.answer_ids) == 13 - len(found.open_ids)
    with refused("an answer must have tokens, got none"):
        session.explain("And?", answer="", template=False)


def test_without_a_memory_all_is_in_the_open_chunk():
    session = InspectedSession(model_of("llama"), tokenizer_of("llama"))
    found = session.explain("Who?", answer="x", template=False)
    assert found.history.passages == ()
    torch.testing.assert_close(found.parts[..., 2:].sum(-1), torch.ones(3, 4, 1))
    assert session.history.mean("gates") is None


def test_a_question_may_close_a_chunk():
    """What the fork folds is in its history, and not in the session's."""
    session = InspectedSession(model_of("overlap"), tokenizer_of("overlap"))
    session.read(TEXT)
    found = session.explain(TEXT[:90], template=False, **ASKED)
    assert found.history.chunks > session.history.chunks
    assert found.history.passages[: session.history.chunks] == session.history.passages
    last = found.history.passages[-1]
    ids = found.session.token_ids(last.begin, last.end)
    assert len(ids) == last.end - last.begin == 12
    known = session.token_ids(0, session.history.end)
    assert found.session.token_ids(0, session.history.end) == known
    assert session.token_ids(0, 10**6) == known


def test_token_ids_are_those_that_were_read():
    for overlap in (0, 3):
        session = InspectedSession(tiny_comet("llama", overlap=overlap))
        ids = random_ids(100).tolist()
        session.read(ids)
        for one in session.history.passages:
            assert session.token_ids(one.begin, one.end) == ids[one.begin : one.end]


@pytest.mark.slow
def test_a_passkey_is_traced_to_where_it_was_told():
    """By the memory that keeps numbers: its chunk gets more of the answer's look than slots."""
    model, tokenizer = cometlm.load("smollm2-passkey", device="cpu", dtype=torch.float32)
    sample = make_task("passkey", tokenizer, seed=2, corpora="python").sample(0, 2500)
    (question,) = sample.questions
    session = InspectedSession(model, tokenizer)
    session.read(sample.context)
    found = session.explain(question.text, max_new_tokens=8, do_sample=False)
    assert found.answer == question.answers[0]
    told = [
        i
        for i, one in enumerate(found.history.passages)
        if one.begin <= question.evidence[0].start and question.evidence[0].stop <= one.end
    ]
    looked = found.passages.mean(0)
    assert int(found.traced.argmax()) in told
    assert looked[told].sum() / looked.sum() > found.history.shares.mean((0, 1))[told].sum()


def test_norms():
    session = InspectedSession(tiny_comet("llama"))
    assert session.norms().shape == (3, 0)
    session.read(random_ids(30))
    state = session._cache.layers[2].memory.state[0, 1]
    assert float(session.norms()[2, 1]) == pytest.approx(float(state.norm()) / 32**0.5, rel=1e-5)
