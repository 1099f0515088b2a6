"""Chat turns one at a time, so that no history has to be kept.

A chat template renders a whole conversation. Here the conversation is in memory already, so a turn
is cut out of a rendering in which stand-ins take the place of what was said before. What a turn
ends with is what the template writes in the middle of a conversation; some end a conversation
otherwise (Phi-3).

Control tokens count in the template's own text and nowhere else: what messages hold of them is text
(`plain_text`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError

from cometlm.sequences import num_shared
from cometlm.session.plain_text import PlainText, unused_mark

Message = Mapping[str, Any]

_SWITCHES = re.compile(r"/(no_)?think\b")  # which SmolLM3's template takes out of what is said
# Digits, which no template writes in other letters.
_QUESTION, _ANSWER, _RESULT = "918273645546372819", "192837465564738291", "564738291019283746"
RAISED = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


class UntakenError(ValueError):
    """A chat template does not take tools or documents, or not here.

    Attributes:
        given: which of them.
    """

    def __init__(self, given: str, message: str) -> None:
        super().__init__(message)
        self.given = given


@dataclass(frozen=True)
class Turn:
    """What stands around a message of the user and its answer.

    Attributes:
        opening: what is read before the answer: the message in its frame, and the answer's head.
        closing: what follows the answer in the middle of a conversation.
        opening_ids, closing_ids: their token ids.
    """

    opening: str
    closing: str
    opening_ids: list[int] = field(default_factory=list)
    closing_ids: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class ChatOptions:
    """What a chat template is given beside messages.

    Attributes:
        tools: what the model may call, as the template takes them.
        variables: others of the template, such as `enable_thinking`.
        special: control tokens that are written in messages count as such: for what was rendered
            by a template already, and for nobody else's text.
    """

    tools: Sequence[Any] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    special: bool = False


PLAIN = ChatOptions()


def render_turn(
    tokenizer: Any,
    prompt: str | Sequence[Message],
    first: bool,
    began: bool,
    options: ChatOptions = PLAIN,
    answered: bool = True,
) -> Turn:
    """One turn in the tokenizer's chat template.

    Args:
        prompt: the user's message, or messages that end with what is to be answered.
        first: no turn came before; later ones have no system message in front.
        began: text was read before, so the text begins with no beginning-of-text token.
        options: what else the template is given.
        answered: the answer stays; else a first turn has no closing.

    Raises:
        ValueError: the tokenizer has no chat template, or one that drops or refuses what is said;
            messages that are none.
    """
    _check_has_template(tokenizer)
    chat = _Chat(tokenizer, checked_messages(prompt), options)
    if first:
        opening, closing = chat.opening(began), chat.closing() if answered else ""
    else:
        opening = chat.later_opening()
        closing = chat.closing_before(opening)
        opening = opening.removeprefix(closing)
    return Turn(
        chat.unmarked(opening), chat.unmarked(closing), chat.ids(opening), chat.ids(closing)
    )


class Conversation:
    """A whole conversation in the tokenizer's chat template, up to the answer that is next.

    Args:
        tokenizer: with a chat template.
        messages: all of them, from the first; they end with what is to be answered.
        options: what else the template is given.

    Attributes:
        ids: token ids up to the answer.
        last_turn: how many of these stand in front of what was said after the last answer.
        closing_ids: what follows the answer in the middle of a conversation.

    Raises:
        ValueError: as `render_turn`.
    """

    def __init__(
        self, tokenizer: Any, messages: Sequence[Message], options: ChatOptions = PLAIN
    ) -> None:
        _check_has_template(tokenizer)
        self._chat = _Chat(tokenizer, checked_messages(messages), options)
        self.ids = self._chat.ids(self._chat.opening(began=False))
        self._closing = self._chat.closing()
        before = self._chat.ids(self._chat.before_last_turn(self._closing))
        self.last_turn = num_shared(self.ids, before)
        self.closing_ids = self._chat.ids(self._closing)

    def answered(self, answer: str | Message) -> list[int]:
        """Ids that the conversation begins with once this is its answer and more is said.

        The answer is a text, or a message that calls tools.

        Not what the model read and wrote: a template may leave out thoughts, and a text may have
        other tokens than it was written with. Empty where the template does not show where an
        answer ends.
        """
        return self._chat.ids(self._chat.answered(answer, self._closing))


def _check_has_template(tokenizer: Any) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{type(tokenizer).__name__} has no chat template; read the message and ask with "
            "template=False"
        )


def checked_messages(prompt: str | Sequence[Message]) -> list[Message]:
    """Messages in the form that templates take: each a role and its content.

    Raises:
        ValueError: something else; says which message.
    """
    if isinstance(prompt, str):
        check_text("the message", prompt)
        return [{"role": "user", "content": prompt}]
    if isinstance(prompt, (Mapping, bytes)) or not isinstance(prompt, Sequence):
        raise ValueError(
            f"a message must be text or a list of messages, got {type(prompt).__name__}"
        )
    if not prompt:
        raise ValueError("messages must be at least one, got none")
    if all(isinstance(part, Mapping) and "type" in part and "role" not in part for part in prompt):
        prompt = [{"role": "user", "content": prompt}]  # one message as a list of its parts
    messages = [_checked_message(f"message {i + 1}", message) for i, message in enumerate(prompt)]
    if messages[-1]["role"] == "assistant":
        raise ValueError("messages must end with what is to be answered, got one of the assistant")
    return messages


def _checked_message(where: str, message: Any) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"{where} must have a role and content, got {message!r}")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return {**message, "content": ""}
    return {**message, "content": content_as_text(where, content)}


def content_as_text(where: str, content: Any) -> str:
    """What a message says; parts of text are joined.

    Raises:
        ValueError: it is no text, or holds images or the like.
    """
    if isinstance(content, Sequence) and not isinstance(content, (str, bytes)):
        texts = []
        for part in content:
            kind = part.get("type", "text") if isinstance(part, Mapping) else None
            if isinstance(part, Mapping) and kind == "text" and isinstance(part.get("text"), str):
                texts.append(part["text"])
            else:
                shown = kind or type(part).__name__
                raise ValueError(f"{where}: content must be text, got a part of type {shown!r}")
        content = "".join(texts)
    if not isinstance(content, str):
        raise ValueError(f"{where}: content must be text, got {type(content).__name__}")
    check_text(where, content)
    return content


def check_text(where: str, text: str) -> bytes:
    """A text in UTF-8.

    Raises:
        ValueError: it holds half of a character, as no text does.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:  # half of a character
        raise ValueError(f"{where} is not Unicode text: {error.reason}") from error


class _Chat:
    """Messages in a tokenizer's chat template, their control tokens marked.

    Args:
        tokenizer: with a chat template.
        messages: what is new.
        options: what else the template is given.
    """

    def __init__(self, tokenizer: Any, messages: list[Message], options: ChatOptions) -> None:
        self._tokenizer = tokenizer
        self._plain = PlainText.of(tokenizer)
        self._options = options
        if "developer" not in str(tokenizer.chat_template):  # OpenAI's name for what is system
            roles = {"developer": "system"}
            messages = [{**one, "role": roles.get(one["role"], one["role"])} for one in messages]
        given: Any = [messages, options.tools, dict(options.variables)]
        self._mark = unused_mark(given)
        if not options.special:
            given = self._plain.escaped(given, self._mark)
        self._messages: list[Any] = given[0]
        self._tools, self._variables = given[1:]
        self._in_parts = False
        self._past = [
            {"role": "user", "content": _QUESTION},
            {"role": "assistant", "content": _ANSWER},
        ]
        if not self._takes_text():
            self._in_parts = True
            self._in_parts = self._takes_text()

    def opening(self, began: bool) -> str:
        """The first turn up to its answer."""
        without = {"bos_token": ""} if began else {}
        text = self._render(self._messages, head=True, **without)
        self._check_kept(text)
        for name in self._beside():
            if text == self._render(self._messages, head=True, **{name: None}, **without):
                raise UntakenError(name, f"the tokenizer's chat template takes no {name}")
        return text

    def later_opening(self) -> str:
        """What follows an earlier answer, up to the new one."""
        text = _after_answer(self._render([*self._past, *self._messages], head=True))
        self._check_kept(text)
        for name in self._beside():
            if text == _after_answer(
                self._render([*self._past, *self._messages], head=True, **{name: None})
            ):
                raise UntakenError(
                    name,
                    f"{name} must be given with a session's first message: the chat template "
                    "writes them in front of a conversation, or takes none",
                )
        return text

    def closing(self) -> str:
        """What follows an answer when the user goes on."""
        more = {"role": "user", "content": _QUESTION}
        return self.closing_before(_after_answer(self._render([*self._past, more], head=True)))

    def closing_before(self, following: str) -> str:
        """The part of what follows an answer in the middle that ends it, and begins nothing."""
        ending = _after_answer(self._render(self._past, head=False))
        if following.startswith(ending):
            return ending
        # At the end of a conversation this template writes something else: what both share, as
        # whole tokens.
        shared = num_shared(following, ending)
        while shared and self._cuts_a_token(following, shared):
            shared -= 1
        return following[:shared] if shared else self._in_front_of_a_turn(following)

    def before_last_turn(self, closing: str) -> str:
        """The conversation up to what was said after its last answer, if there is one."""
        answers = [i for i, one in enumerate(self._messages) if one["role"] == "assistant"]
        if not answers:
            return ""
        try:
            return self._answered(self._messages[: answers[-1] + 1], closing)
        except ValueError:  # a template that wants the results of tools there
            return ""

    def answered(self, answer: str | Message, closing: str) -> str:
        """The conversation and an answer, up to where the next message begins; or nothing."""
        said = {"role": "assistant", "content": answer} if isinstance(answer, str) else answer
        if self._mark in json.dumps(said, ensure_ascii=False):
            return ""
        escaped = self._plain.escaped(said, self._mark)
        return self._answered([*self._messages, escaped], closing)

    def _answered(self, messages: list[Any], closing: str) -> str:
        """Messages that end with an answer, as they stand in front of more; or nothing."""
        more = {"role": "user", "content": _QUESTION}
        text = self._render([*messages, more], head=True)
        after = _after_answer(self._render([*self._past, more], head=True))
        return text.removesuffix(after) + closing if text.endswith(after) else ""

    def ids(self, text: str) -> list[int]:
        """Token ids of what was rendered."""
        return self._plain.encode_frame(text, self._mark)

    def unmarked(self, text: str) -> str:
        """What was rendered, as it is meant."""
        return text.replace(self._mark, "")

    # --- inside -----------------------------------------------------------------------------

    def _in_front_of_a_turn(self, following: str) -> str:
        """What ends an answer that ends quite otherwise at the end of a conversation (gpt-oss).

        It is what stands in front of a user's turn and not in front of the first one.
        """
        user = {"role": "user", "content": _QUESTION}
        first = self._render([user], head=False).partition(_QUESTION)[0]
        later = _after_answer(self._render([*self._past, user], head=True)).partition(_QUESTION)[0]
        end = len(later) - num_shared(first[::-1], later[::-1])
        while self._cuts_a_token(later, end):
            end += 1
        return later[:end] if following.startswith(later[:end]) else ""

    def _cuts_a_token(self, text: str, at: int) -> bool:
        """Whether a control token goes over this place."""
        return any(
            text.startswith(content, begin)
            for content in self._plain.control
            for begin in range(max(0, at - len(content) + 1), at)
        )

    def _beside(self) -> list[str]:
        """What was given beside messages, and a template may leave out in silence."""
        given = {"tools": self._tools, "documents": self._variables.get("documents")}
        return [name for name, value in given.items() if value]

    def _check_kept(self, text: str) -> None:
        """Refuse a template that leaves out what somebody said, in silence."""
        rendered = text.casefold()
        for message in self._messages:
            role, content = message["role"], message["content"].casefold()
            forms = {content.strip(), _SWITCHES.sub("", content).strip()}
            is_said = any(form in rendered for form in forms)
            if role in ("system", "developer", "user") and not is_said:
                hint = "" if role == "user" else "; say it in the user's message"
                raise ValueError(
                    f"the tokenizer's chat template leaves out the {role} message here{hint}"
                )
            for call in message.get("tool_calls") or ():
                if str(call.get("function", call).get("name")).casefold() not in rendered:
                    raise ValueError("the tokenizer's chat template leaves out calls of tools")
        self._check_results_kept()

    def _check_results_kept(self) -> None:
        """The same of what tools gave, which a template may write as JSON."""
        if any(message["role"] == "tool" for message in self._messages):
            stand_ins = [
                {**one, "content": _RESULT} if one["role"] == "tool" else one
                for one in self._messages
            ]
            if _RESULT not in self._render([*self._past, *stand_ins], head=True):
                raise ValueError("the tokenizer's chat template leaves out what tools gave")

    def _takes_text(self) -> bool:
        """Whether the template takes content as text; some want a list of parts."""
        try:
            return _QUESTION in self._render(self._past[:1], head=False)
        except ValueError:
            return False

    def _render(self, messages: list[Any], head: bool, **changed: Any) -> str:
        given = {"tools": self._tools, **self._variables, **changed}
        if self._in_parts:
            messages = [{**one, "content": _as_parts(one["content"])} for one in messages]
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=head, **given
            )
        except RAISED as error:
            raise ValueError(f"the tokenizer's chat template refuses this: {error}") from error
        check_text("what the chat template makes of this", text)  # roles, tools, variables
        return text


def _as_parts(content: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}]


def _after_answer(text: str) -> str:
    _, found, after = text.partition(_ANSWER)  # the first: the message may hold these words too
    if not found:
        raise ValueError("the tokenizer's chat template leaves out earlier answers")
    return after
