"""One session in several threads, and what may not enter a session."""

import copy
import pickle
import threading

import pytest

from cometlm import Session
from cometlm.session.chat_template import ChatOptions
from cometlm.session.options import template_variables
from tests import real
from tests.sessions import GREEDY, TEXT, assert_same, session_of

pytestmark = pytest.mark.usefixtures("small_windows")


def test_threads_that_read_lose_nothing():
    """Each one's text stays whole; which comes first is open."""
    texts = [f"{name} " + TEXT[:600] for name in ("one", "two", "three")]
    session = session_of()
    threads = [threading.Thread(target=session.read, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    wholes = []
    for order in orders:
        whole = session_of()
        whole.read("".join(texts[i] for i in order))
        list(whole.finish())
        wholes.append(whole._open)
    list(session.finish())
    assert session.characters == sum(map(len, texts))
    assert session._open in wholes


def test_a_session_may_be_asked_while_it_is_read():
    session, answers = session_of(), []
    begun, asked = threading.Event(), threading.Event()

    def text():
        yield TEXT[:300]
        begun.set()
        asked.wait(30)
        yield TEXT[300:]

    thread = threading.Thread(target=session.read, args=(text(),))
    thread.start()
    begun.wait(30)
    answers.append(session.ask("Why?", max_new_tokens=2, **GREEDY))
    fork = session.fork()
    asked.set()
    thread.join()
    want = session_of()
    want.read(TEXT[:300])
    assert answers == [want.ask("Why?", max_new_tokens=2, **GREEDY)]
    assert_same(fork, want)
    want.read(TEXT[300:])
    assert_same(session, want)


VERBS = {
    "read": lambda session: session.read("more"),
    "chat": lambda session: session.chat("And then?", max_new_tokens=2),
    "finish": lambda session: list(session.finish()),
    "ask_in_one_chunk": lambda session: session.ask_in_one_chunk([5]),
}


@pytest.mark.parametrize("verb", VERBS)
def test_nothing_is_read_while_an_answer_is_written(verb):
    session = session_of()
    session.read(TEXT[:200])
    answer = session.chat("Why?", stream=True, max_new_tokens=4, **GREEDY)
    next(answer)
    with pytest.raises(RuntimeError, match="chat"):
        VERBS[verb](session)
    assert session.ask("Who?", max_new_tokens=2, **GREEDY)  # a fork may go on
    answer.close()
    session.read("more")


# --- tokens that the model lacks ----------------------------------------------------------------


@pytest.fixture
def wide():
    """A tokenizer with a word more than the model has embeddings."""
    tokenizer = copy.deepcopy(real.tokenizer("smollm2"))
    tokenizer.add_tokens(["<extra>"])
    return tokenizer


def test_a_token_that_the_model_lacks_does_not_enter(wide, tmp_path):
    session = Session(session_of().model, wide)
    session.read(TEXT[:300])
    list(session.settle())  # as a question does
    before = session.fork()
    for text in ("one <extra> two", "<extra>", "One. <extra>" + TEXT[:400]):
        with pytest.raises(ValueError, match=r"must lie in 0 … 49151.* 49152 for '<extra>'"):
            session.read(text)
        with pytest.raises(ValueError, match="must lie in 0 … 49151"):
            session.ask(text, max_new_tokens=2)
        assert_same(session, before)
    session.read("<ext")
    with pytest.raises(ValueError, match="49152"):
        session.read("ra>")
    session.read("ended.")
    session.save(tmp_path / "s")
    loaded = Session.load(tmp_path / "s", session.model, wide)
    assert_same(loaded, session)


def test_a_control_token_that_the_model_lacks_is_text(wide):
    wide.add_special_tokens({"pad_token": "[PAD]"})
    session = Session(session_of().model, wide)
    session.read("padded [PAD] text")
    with pytest.raises(ValueError, match=r"49153 for '\[PAD\]'"):
        session.read("padded [PAD] text", special=True)


# --- options of an answer -----------------------------------------------------------------------


@pytest.fixture
def asked():
    session = session_of()
    session.read(TEXT[:200])
    return session, session.ask("Why?", max_new_tokens=12, **GREEDY)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_behind_a_stop_string(asked, stream):
    session, whole = asked
    stop = whole[len(whole) // 2 :][:3]
    options = {"max_new_tokens": 12, "stop_strings": [stop], **GREEDY}
    said = "".join(session.ask("Why?", stream=stream, **options))
    assert whole.startswith(said)
    assert said.endswith(stop) or stop in said
    assert len(said) < len(whole)


@pytest.mark.parametrize("verb", ["ask", "chat"])
def test_a_stream_takes_stopping_criteria(asked, verb):
    session, whole = asked
    seen = []

    def second_token(input_ids, scores, **options):
        seen.append(input_ids.shape[1])
        return input_ids.new_full((1,), len(seen) >= 2, dtype=bool)

    options = {"max_new_tokens": 12, "stopping_criteria": [second_token], **GREEDY}
    said = "".join(getattr(session, verb)("Why?", stream=True, **options))
    assert whole.startswith(said)
    assert len(seen) == 2


@pytest.mark.parametrize("name", ["max_length", "min_length"])
def test_lengths_that_count_what_was_read_are_refused(asked, name):
    session, _ = asked
    with pytest.raises(ValueError, match=f"{name}=500 counts tokens that were read"):
        session.ask("Why?", **{name: 500})


@pytest.mark.parametrize("stops", ["", ["a", ""]], ids=repr)
def test_a_stop_string_must_hold_text(asked, stops):
    session, _ = asked
    with pytest.raises(ValueError, match="stop_strings must hold text, got an empty string"):
        session.ask("Why?", stop_strings=stops)


@pytest.mark.parametrize("stops", [[], (), None], ids=repr)
def test_no_stop_strings_are_none(asked, stops):
    session, whole = asked
    assert session.ask("Why?", stop_strings=stops, max_new_tokens=12, **GREEDY) == whole


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "past_key_values", "cache"])
def test_what_a_session_holds_is_not_given_to_it(asked, name):
    session, _ = asked
    with pytest.raises(ValueError, match=f"{name} is the session's to give"):
        session.ask("Why?", **{name: None})


def test_a_generation_config_is_one(asked):
    session, _ = asked
    with pytest.raises(ValueError, match="generation_config must be a GenerationConfig, got dict"):
        session.ask("Why?", generation_config={"max_new_tokens": 2})


@pytest.mark.parametrize("given", [{"system": "\ud800"}, {"chat_template_kwargs": {"x": "\ud800"}}])
def test_half_a_character_is_refused_wherever_it_stands(asked, given):
    session, _ = asked
    talk = Session(session.model, copy.deepcopy(session.tokenizer))
    talk.tokenizer.chat_template = "{{ x }}" + session.tokenizer.chat_template
    with pytest.raises(ValueError, match="is not Unicode text"):
        talk.chat("Why?", **given)
    assert talk.turns == 0
    with pytest.raises(ValueError, match="is not Unicode text"):
        talk.ask([{"role": "\ud800", "content": "Why?"}])


def test_variables_of_the_template_are_told_from_options(asked):
    session, _ = asked
    plain = session.tokenizer.chat_template
    other = copy.deepcopy(session.tokenizer)
    other.chat_template = "{% if greet %}Hello! {% endif %}" + plain
    talk = Session(session.model, other)
    greeted = {"chat_template_kwargs": {"greet": True}}, {"greet": True}
    assert template_variables(other, {"greet": 1, "top_k": 5}) == ({"greet": 1}, {"top_k": 5})
    said = [talk.ask("Who?", max_new_tokens=3, **GREEDY, **given) for given in greeted]
    assert said[0] == said[1]
    assert session.ask("Who?", enable_thinking=False, max_new_tokens=2, **GREEDY)
    with pytest.raises(ValueError, match="greet"):
        session.ask("Who?", greet=True)


def test_messages_are_taken_as_a_list(asked):
    session, whole = asked
    message = {"role": "user", "content": [{"type": "text", "text": "Why?"}]}
    assert session.ask([message], max_new_tokens=12, **GREEDY) == whole
    system = {"role": "system", "content": "Be brief."}
    said = session.ask([system, message], max_new_tokens=3, **GREEDY)
    assert said == session.ask("Why?", system="Be brief.", max_new_tokens=3, **GREEDY)
    for wrong, why in [
        ([], "at least one"),
        (["Why?"], "message 1 must have a role and content"),
        ([{"role": "user", "content": [{"type": "image"}]}], "a part of type 'image'"),
        ([{"role": "user", "content": 3}], "content must be text, got int"),
        ([{"role": "assistant", "content": "So."}], "must end with what is to be answered"),
        (None, "must be text or a list of messages, got NoneType"),
        (b"Why?", "must be text or a list of messages, got bytes"),
    ]:
        with pytest.raises(ValueError, match=why):
            session.chat(wrong)


def test_tools_are_for_the_first_message(asked):
    session, _ = asked
    tokenizer = copy.deepcopy(session.tokenizer)
    tokenizer.chat_template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}" + tokenizer.chat_template
    )
    talk = Session(session.model, tokenizer)
    tools = [{"type": "function", "function": {"name": "look<|im_end|>"}}]
    assert "look<|im_end|>" in talk._turn("Who?", ChatOptions(tools)).opening
    talk.chat("Who?", tools=tools, max_new_tokens=2, **GREEDY)
    talk.chat("Why?", max_new_tokens=2, **GREEDY)
    with pytest.raises(ValueError, match="tools must be given with a session's first message"):
        talk.chat("Why?", tools=tools, max_new_tokens=2)


# --- what is no way to leave a session ----------------------------------------------------------


def test_an_interrupt_while_an_answer_is_read_back_locks_nothing(asked, monkeypatch):
    session, _ = asked
    before = session.fork()

    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr("cometlm.session.session._ended", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.chat("Why?", max_new_tokens=2, **GREEDY)
    monkeypatch.undo()
    assert_same(session, before)
    session.chat("Why?", max_new_tokens=2, **GREEDY)
    assert session.turns == 1


def test_a_copy_is_a_fork(asked):
    session, _ = asked
    other, before = copy.copy(session), session.fork()
    other.read("more " * 40)
    assert_same(session, before)
    assert other._reads is not session._reads
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"kept by save\(\) and copied by fork\(\)"):
            copied(session)


def test_reading_waits_for_what_is_foreseen():
    session = session_of()
    session.read(TEXT[:100])
    held = []
    hook = session.model.lm_head.register_forward_hook(
        lambda *given: held.append(_is_held(session._reads))
    )
    try:
        session.read_foreseen([5, 6])
    finally:
        hook.remove()
    assert held == [True]
    assert not _is_held(session._reads)


def _is_held(lock):
    """Whether another thread has to wait for a lock."""
    got = []

    def take():
        got.append(lock.acquire(blocking=False))
        if got[0]:
            lock.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return not got[0]
