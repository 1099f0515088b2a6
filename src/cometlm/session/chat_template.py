"""Chat turns as text, one at a time, so that no history has to be kept.

A chat template renders a whole conversation. Here the conversation is in memory already, so a turn
is cut out of a rendering in which stand-ins take the place of what was said before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

_QUESTION, _ANSWER = "cometlm stand-in question", "cometlm stand-in answer"


@dataclass(frozen=True)
class Turn:
    """The text around one message of the user and its answer.

    Attributes:
        opening: what is read before the answer: the message in its frame, and the answer's head.
        closing: what follows the answer.
    """

    opening: str
    closing: str


def render_turn(tokenizer: Any, message: str, first: bool, began: bool) -> Turn:
    """One turn in the tokenizer's chat template.

    Args:
        first: no turn came before; later ones have no system message in front.
        began: text was read before, so the text begins with no beginning-of-text token.

    Raises:
        ValueError: the tokenizer has no chat template, or one that drops what was said.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{type(tokenizer).__name__} has no chat template; read the message and ask with "
            "template=False"
        )
    question = {"role": "user", "content": _QUESTION}
    answer = {"role": "assistant", "content": _ANSWER}
    new = {"role": "user", "content": message}
    closing = _after_answer(_render(tokenizer, [question, answer], head=False))
    if first:
        opening = _render(tokenizer, [new], head=True, **({"bos_token": ""} if began else {}))
    else:
        opening = _after_answer(_render(tokenizer, [question, answer, new], head=True))
        opening = opening.removeprefix(closing)
    return Turn(opening, closing)


def _render(tokenizer: Any, messages: list[dict[str, str]], head: bool, **variables: str) -> str:
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=head, **variables
        )
    except TemplateError as error:
        raise ValueError(f"the tokenizer's chat template refuses this: {error}") from error
    return text


def _after_answer(text: str) -> str:
    _, found, after = text.partition(_ANSWER)  # the first: the message may hold these words too
    if not found:
        raise ValueError("the tokenizer's chat template leaves out earlier answers")
    return after
