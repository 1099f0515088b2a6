"""Chat turns in the templates of many families: closings, and messages that hold control tokens."""

import copy
import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cometlm.session.chat_template import ChatOptions, Conversation, render_turn
from cometlm.session.plain_text import PlainText
from tests import real
from tests.chat_templates import FAMILIES
from tests.tiny import examples

WORDS = ["the lamp", " is out", "\n\n", "Who?", "naïve ☂️", "{{ x }}", "<|", "|>", "</", "[/", "<"]


@functools.cache
def tokenizer_of(name):
    """SmolLM2's, with a family's template and control tokens."""
    family = FAMILIES[name]
    tokenizer = copy.deepcopy(real.tokenizer("smollm2"))
    special = dict.fromkeys([*family.special, family.bos, family.eos])
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.add_tokens(list(family.added))
    tokenizer.bos_token, tokenizer.eos_token = family.bos, family.eos
    tokenizer.chat_template = family.template
    return tokenizer


def rendered(tokenizer, texts, head=True):
    roles = ["user", "assistant"]
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=head)


def by_turns(name, questions, answers):
    """The text of a session: all questions, and answers to all but the last."""
    tokenizer, text = tokenizer_of(name), ""
    for i, question in enumerate(questions):
        turn = render_turn(tokenizer, question, i == 0, began=i > 0)
        text += turn.opening
        if i < len(answers):
            text += FAMILIES[name].lead + answers[i] + turn.closing
    return text


every = pytest.mark.parametrize("name", FAMILIES)


@every
def test_turns_are_the_conversation_that_the_template_renders(name):
    asked, said = ["Who is there?", "Why?", "And then?"], ["Nobody.", "The keeper sleeps."]
    mixed = [asked[0], said[0], asked[1], said[1], asked[2]]
    assert by_turns(name, asked, said) == rendered(tokenizer_of(name), mixed)


@every
def test_the_closing_is_that_of_the_middle(name):
    tokenizer, closing = tokenizer_of(name), FAMILIES[name].closing
    for first in (True, False):
        turn = render_turn(tokenizer, "Who?", first, began=not first)
        assert turn.closing == closing
        assert turn.closing_ids == tokenizer.encode(closing, add_special_tokens=False)


@every
@examples(15)
@given(data=st.data())
def test_what_a_message_holds_of_control_tokens_is_text(name, data):
    """As many control tokens as a plain message's frame has, and every character is there."""
    tokenizer = tokenizer_of(name)
    control = PlainText.of(tokenizer).control
    parts = st.one_of(st.sampled_from(WORDS), st.sampled_from(sorted(control)))
    message = "x" + "".join(data.draw(st.lists(parts, max_size=8))) + "x"
    first = data.draw(st.booleans())
    turn = render_turn(tokenizer, message, first, began=False)
    plain = render_turn(tokenizer, "x", first, began=False)

    def counted(ids):
        return [i for i in ids if i in control.values()]

    assert counted(turn.opening_ids) == counted(plain.opening_ids)
    assert tokenizer.decode(turn.opening_ids) == turn.opening
    assert message in turn.opening


@every
@examples(15)
@given(data=st.data())
def test_a_conversation_begins_as_the_one_before_it_was_answered(name, data):
    """So who sends all of it again is known by its ids, whatever was said."""
    tokenizer = tokenizer_of(name)
    parts = st.sampled_from([*WORDS, *sorted(PlainText.of(tokenizer).control)])
    words = st.lists(parts, min_size=1, max_size=6).map("".join).filter(str.strip)
    texts = data.draw(st.lists(words, min_size=5, max_size=5))
    texts[::2] = [f"x{text}x" for text in texts[::2]]  # what a template must not drop
    roles = ["user", "assistant"]
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    before: list[int] = []
    for end in (1, 3, 5):
        conversation = Conversation(tokenizer, messages[:end])
        assert conversation.ids[: len(before)] == before
        assert conversation.last_turn == len(before)
        if end < 5:
            before = conversation.answered(texts[end])
            assert before
    first = Conversation(tokenizer, messages[:1])
    turn = render_turn(tokenizer, texts[0], True, False)
    assert (first.ids, first.closing_ids) == (turn.opening_ids, turn.closing_ids)
    assert first.last_turn == 0


@every
def test_what_was_rendered_already_may_count(name):
    tokenizer, end = tokenizer_of(name), FAMILIES[name].eos
    turn = render_turn(tokenizer, f"a{end}b", True, False, ChatOptions(special=True))
    assert turn.opening_ids == tokenizer.encode(turn.opening, add_special_tokens=False)


@every
def test_the_frame_counts_where_the_tokenizer_splits_special_tokens(name):
    tokenizer = copy.deepcopy(tokenizer_of(name))
    want = render_turn(tokenizer, "Who?", True, False).opening_ids
    tokenizer.split_special_tokens = True
    assert render_turn(tokenizer, "Who?", True, False).opening_ids == want


def test_a_system_message_that_a_template_drops_or_refuses_is_said():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    with pytest.raises(ValueError, match="System role not supported"):
        render_turn(tokenizer_of("Gemma 2"), messages, True, False)
    assert "Be brief." in render_turn(tokenizer_of("Gemma 3"), messages, True, False).opening
    dropping = copy.deepcopy(tokenizer_of("ChatML"))
    dropping.chat_template = (
        "{% for m in messages if m.role != 'system' %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(ValueError, match="leaves out the system message"):
        render_turn(dropping, messages, True, False)


def test_what_developers_say_is_of_the_system_where_a_template_has_no_other_name():
    def opening(template, role):
        tokenizer = copy.deepcopy(tokenizer_of("ChatML"))
        tokenizer.chat_template = template
        messages = [{"role": role, "content": "Be brief."}, {"role": "user", "content": "Who?"}]
        return render_turn(tokenizer, messages, True, False).opening

    plain = FAMILIES["ChatML"].template
    assert opening(plain, "developer") == opening(plain, "system")
    known = plain + "{# developer #}"
    assert opening(known, "developer") == opening(plain, "system").replace("system", "developer")


def test_a_switch_that_a_template_takes_out_of_what_is_said():
    """SmolLM3's /think and /no_think."""
    tokenizer = copy.deepcopy(tokenizer_of("ChatML"))
    tokenizer.chat_template = FAMILIES["ChatML"].template.replace(
        "{{ m.content }}", "{{ m.content.replace('/no_think', '').replace('/think', '').rstrip() }}"
    )
    messages = [
        {"role": "system", "content": "You are a pirate. /no_think"},
        {"role": "user", "content": "Who? /think"},
    ]
    opening = render_turn(tokenizer, messages, True, False).opening
    assert "You are a pirate." in opening
    assert "think" not in opening


def test_parts_of_a_message_are_joined_before_they_are_looked_at():
    """Halves of a control token in two parts make none."""
    tokenizer = tokenizer_of("ChatML")
    parts = [{"type": "text", "text": "a<|im_"}, {"type": "text", "text": "end|>b"}]
    turn = render_turn(tokenizer, [{"role": "user", "content": parts}], True, False)
    assert turn == render_turn(tokenizer, "a<|im_end|>b", True, False)
    assert turn.opening_ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1


def test_templates_that_want_parts_get_them():
    tokenizer = copy.deepcopy(tokenizer_of("ChatML"))
    want = render_turn(tokenizer, "Who?", True, False)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}"
    )
    assert render_turn(tokenizer, "Who?", True, False) == want
