"""Chat turns one at a time are the conversation that a template renders at once."""

import copy
from types import SimpleNamespace

import pytest

from cometlm.session.chat_template import _ANSWER, _QUESTION, render_turn
from tests import real

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "ChatML": CHATML,
    "ChatML after a token of its own": "{{ bos_token }}" + CHATML,
    "like Gemma": (
        "{{ bos_token }}{% for m in messages %}<start_of_turn>"
        "{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "like Llama 2": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} "
        "[/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    "with a system message in front": (
        "{{ bos_token }}<|system|>Be brief.<|end|>{% for m in messages %}<|{{ m.role }}|>"
        "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "words only": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    ),
}
MESSAGES = {
    "plain": ("Who is there?", "Why is the lamp out?", "And then?"),
    "of several lines": ("One.\n\nTwo.", "<|im_start|>user\nnot a frame", "naïve ☂️ {{ braces }}"),
    "with the stand-ins": (
        _QUESTION,
        f"what is the {_ANSWER} here?",
        _ANSWER,
    ),
}
ANSWERS = ("Nobody.", "The keeper is asleep.", "Then the ship sank.")


def tokenizer_with(template, bos="<bos>"):
    tokenizer = copy.deepcopy(real.tokenizer("like gemma"))
    tokenizer.chat_template = template
    tokenizer.bos_token, tokenizer.eos_token = bos, "<eos>"
    return tokenizer


def conversation(messages, answers):
    roles = [("user", "assistant")] * len(messages)
    pairs = zip(roles, zip(messages, answers, strict=True), strict=True)
    return [
        {"role": role, "content": content}
        for names, said in pairs
        for role, content in zip(names, said, strict=True)
    ]


def at_once(tokenizer, messages, answers):
    return tokenizer.apply_chat_template(conversation(messages, answers), tokenize=False)


def by_turns(tokenizer, messages, answers, began=False):
    text = ""
    for number, (message, answer) in enumerate(zip(messages, answers, strict=True)):
        turn = render_turn(tokenizer, message, number == 0, began or number > 0)
        text += turn.opening + answer + turn.closing
    return text


@pytest.mark.parametrize("kind", MESSAGES)
@pytest.mark.parametrize("template", TEMPLATES)
def test_turns_are_the_whole_conversation(template, kind):
    tokenizer, messages = tokenizer_with(TEMPLATES[template]), MESSAGES[kind]
    assert by_turns(tokenizer, messages, ANSWERS) == at_once(tokenizer, messages, ANSWERS)


@pytest.mark.parametrize("kind", MESSAGES)
def test_turns_of_smollm2(kind):
    tokenizer, messages = real.tokenizer("smollm2"), MESSAGES[kind]
    assert by_turns(tokenizer, messages, ANSWERS) == at_once(tokenizer, messages, ANSWERS)


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_first_opening_is_the_generation_prompt(template):
    tokenizer = tokenizer_with(TEMPLATES[template])
    want = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who?"}], tokenize=False, add_generation_prompt=True
    )
    assert render_turn(tokenizer, "Who?", True, began=False).opening == want


@pytest.mark.parametrize("template", [name for name in TEMPLATES if "{{ bos" in TEMPLATES[name]])
def test_no_text_begins_in_the_middle(template):
    """After other text, the template's beginning-of-text token is left out, once."""
    tokenizer = tokenizer_with(TEMPLATES[template])
    alone = at_once(tokenizer, MESSAGES["plain"], ANSWERS)
    assert alone.startswith("<bos>")
    text = by_turns(tokenizer, MESSAGES["plain"], ANSWERS, began=True)
    assert text == alone.removeprefix("<bos>")


def test_a_frame_that_opens_with_the_beginning_token_stays_whole():
    """SmolLM2's <|im_start|> is both."""
    for tokenizer in (real.tokenizer("smollm2"), tokenizer_with(CHATML, bos="<|im_start|>")):
        assert tokenizer.bos_token == "<|im_start|>"
        for messages in MESSAGES.values():
            want = at_once(tokenizer, messages, ANSWERS)
            assert by_turns(tokenizer, messages, ANSWERS, began=True) == want


def test_a_beginning_token_in_front_of_such_a_frame_is_left_out_once():
    tokenizer = tokenizer_with("{{ bos_token }}" + CHATML, bos="<|im_start|>")
    whole = at_once(tokenizer, MESSAGES["plain"], ANSWERS)
    assert whole.startswith("<|im_start|><|im_start|>user")
    text = by_turns(tokenizer, MESSAGES["plain"], ANSWERS, began=True)
    assert text == whole.removeprefix("<|im_start|>")


DROPS = {
    "all but the last message": "{{ messages[-1].content }}",
    "what the assistant said": (
        "{% for m in messages %}{% if m.role == 'user' %}U: {{ m.content }}{% endif %}{% endfor %}"
    ),
    "answers before the last message": (
        "{% for m in messages %}{% if m.role == 'user' or loop.last %}{{ m.role }}: "
        "{{ m.content }}\n{% endif %}{% endfor %}"
    ),
}


@pytest.mark.parametrize("template", DROPS)
def test_a_template_that_drops_answers_is_refused(template):
    tokenizer = tokenizer_with(DROPS[template])
    with pytest.raises(ValueError, match="leaves out earlier answers"):
        render_turn(tokenizer, "Who?", first=False, began=True)


@pytest.mark.parametrize("template", [None, ""])
def test_a_tokenizer_without_a_template_is_refused(template):
    tokenizer = tokenizer_with(template)
    with pytest.raises(ValueError, match="has no chat template"):
        render_turn(tokenizer, "Who?", first=True, began=False)
    with pytest.raises(ValueError, match="has no chat template"):
        render_turn(SimpleNamespace(), "Who?", first=True, began=False)


def test_a_template_that_refuses_the_message_says_so():
    tokenizer = tokenizer_with("{{ raise_exception('no messages today') }}")
    with pytest.raises(ValueError, match="no messages today"):
        render_turn(tokenizer, "Who?", first=True, began=False)
