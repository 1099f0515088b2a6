"""Tools: calls of them found in what a model writes, while it writes.

Which form a model writes calls in is told by its chat template. A tokenizer that describes its own
answers (`response_template`, or `response_schema` in older transformers) is believed instead.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cometlm.compat import describes_answers, parsed_answer
from cometlm.session.plain_text import PlainText

_JSON = json.JSONDecoder()
_NAMED = re.compile(r"\s*([\w.-]+)\s*(?:\[ARGS\])?\s*(?=\{)")
_ID = 9  # letters: Mistral's templates want as many


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool.

    Attributes:
        id: what its result will be sent with.
        name: of the tool.
        arguments: JSON of an object.
    """

    id: str
    name: str
    arguments: str

    def to_chat(self) -> dict[str, Any]:
        """As OpenAI's chats have it."""
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }


@dataclass(frozen=True)
class _Form:
    """One way to write calls.

    Attributes:
        markers: what a call begins with.
        find: what an answer says beside its calls, and these; no calls if it holds none.
        bare: an answer that begins with a brace may be one, too.
        end: what every call ends with; None: nothing of its own.
    """

    markers: tuple[str, ...]
    find: Callable[[str, Collection[str]], tuple[str, list[ToolCall]]]
    bare: bool = False
    end: str | None = None


def _hermes(text: str, names: Collection[str]) -> tuple[str, list[ToolCall]]:
    """`<tool_call>{"name": …, "arguments": {…}}</tool_call>`, as often as it likes."""
    calls: list[ToolCall] = []
    rest, _, tail = text.partition("<tool_call>")
    while tail:
        value, behind = _json(tail)
        found = _call(value)
        if found is None:
            return text, []
        calls.append(found)
        after = behind.lstrip().removeprefix("</tool_call>")
        more, _, tail = after.partition("<tool_call>")
        rest = rest.rstrip() + more
    return rest.rstrip() if calls else text, calls


def _mistral(text: str, names: Collection[str]) -> tuple[str, list[ToolCall]]:
    """`[TOOL_CALLS]` in front of a list, or of a name and `[ARGS]` for each call."""
    front, *parts = text.split("[TOOL_CALLS]")
    calls: list[ToolCall | None] = []
    for part in parts:
        named = _NAMED.match(part)
        value, _ = _json(part[named.end() :] if named else part)
        if named:
            value = {"name": named[1], "arguments": value}
        calls += [_call(one) for one in (value if isinstance(value, list) else [value])]
    known = [call for call in calls if call is not None]
    return (front.rstrip(), known) if known and len(known) == len(calls) else (text, [])


def _llama(text: str, names: Collection[str]) -> tuple[str, list[ToolCall]]:
    """`{"name": …, "parameters": …}`, in an answer that is nothing but calls of known tools."""
    tail = text.strip().removeprefix("<|python_tag|>")
    calls: list[ToolCall] = []
    while tail:
        value, tail = _json(tail)
        found = _call(value)
        if found is None or found.name not in names:
            return text, []
        calls.append(found)
        tail = tail.lstrip().lstrip(";,").lstrip()
    return ("", calls) if calls else (text, [])


# The first whose sign stands in a chat template.
_FORMS: dict[str, _Form] = {
    "<tool_call>": _Form(("<tool_call>",), _hermes, end="</tool_call>"),
    "[TOOL_CALLS]": _Form(("[TOOL_CALLS]",), _mistral),
    "<|python_tag|>": _Form(("<|python_tag|>",), _llama, bare=True),
    '"parameters"': _Form((), _llama, bare=True),
}
_SHOWN = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>")


class Calling:
    """How calls of some tools are found in answers.

    Args:
        tokenizer: of the model, with a chat template.
        tools: in the form of OpenAI's chats.

    Attributes:
        shown: ids of special tokens that have to stay in an answer's text.

    Raises:
        ValueError: nobody knows how this model writes calls.
    """

    def __init__(self, tokenizer: Any, tools: Sequence[Mapping[str, Any]]) -> None:
        self.tokenizer, self.tools = tokenizer, list(tools)
        self.names = frozenset(tool["function"]["name"] for tool in tools)
        self.is_described = describes_answers(tokenizer)
        template = str(tokenizer.chat_template)
        found = next((form for sign, form in _FORMS.items() if sign in template), None)
        if found is None and not self.is_described:
            raise ValueError(
                "the tokenizer's chat template does not show how this model calls tools (known "
                f"are {', '.join(list(_FORMS)[:-1])} and JSON with parameters)"
            )
        self.form = found
        special = PlainText.of(tokenizer).special
        self.shown = frozenset(
            tokenizer.convert_tokens_to_ids(token) for token in _SHOWN if token in special
        )

    @property
    def end(self) -> str | None:
        """What every call ends with; None: nothing of its own."""
        return None if self.form is None else self.form.end

    def find(self, text: str, ids: Sequence[int], prompt: str) -> tuple[str, list[ToolCall]]:
        """What an answer says beside its calls, and these.

        Args:
            text: of the answer.
            ids: its tokens.
            prompt: text in front of it.
        """
        if self.is_described:
            try:
                raw = self.tokenizer.decode(list(ids))
                said = parsed_answer(self.tokenizer, raw, prompt, self.tools)
                calls = [_call(one.get("function", one)) for one in said.get("tool_calls") or ()]
            except (ValueError, TypeError, LookupError, AttributeError):  # cut off, say
                return text, []
            known = [call for call in calls if call is not None]
            return (str(said.get("content") or "").rstrip(), known) if known else (text, [])
        assert self.form is not None
        return self.form.find(text, self.names)


class CallFilter:
    """Takes an answer in pieces, and gives out what can be in no call.

    Args:
        calling: how calls are found.
    """

    def __init__(self, calling: Calling) -> None:
        self._calling = calling
        self._text, self._given = "", 0
        self._holds = calling.is_described

    def feed(self, text: str) -> str:
        """Take a piece; what is certain to be said."""
        self._text += text
        form = self._calling.form
        if form is not None and not self._holds:
            begins = form.bare and self._text.lstrip().startswith("{")
            self._holds = begins or any(marker in self._text for marker in form.markers)
        if self._holds or form is None:
            return ""
        end = len(self._text.rstrip())
        for marker in form.markers:
            for size in range(1, len(marker)):
                if self._text.endswith(marker[:size]):
                    end = min(end, len(self._text[:-size].rstrip()))
        return self._give(self._text[: max(end, self._given)])

    def finish(self, text: str, ids: Sequence[int], prompt: str) -> tuple[str, str, list[ToolCall]]:
        """What was held back of what is said, all that is said, and the calls.

        Args:
            text, ids, prompt: as `Calling.find`.
        """
        said, calls = self._calling.find(text, ids, prompt)
        return self._give(said), said, calls

    def _give(self, text: str) -> str:
        given, self._given = text[self._given :], len(text)
        return given


def digest_of(tools: Sequence[Mapping[str, Any]] | None) -> str | None:
    """What only these tools have; None of none."""
    if not tools:
        return None
    return hashlib.sha256(json.dumps(list(tools), sort_keys=True).encode()).hexdigest()


def template_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as chat templates take them: arguments are objects, and results have names.

    Raises:
        ValueError: arguments that are no object in JSON.
    """
    names: dict[str, str] = {}
    made = []
    for i, message in enumerate(messages):
        one = dict(message)
        if message.get("tool_calls"):
            one["tool_calls"] = [_for_template(i, call) for call in message["tool_calls"]]
            names |= {call["id"]: call["function"]["name"] for call in message["tool_calls"]}
        name = names.get(message.get("tool_call_id") or "")
        if name is not None:
            one.setdefault("name", name)
        made.append(one)
    return made


def answered_message(text: str, calls: Sequence[ToolCall]) -> str | dict[str, Any]:
    """An answer as it stands in a conversation later on."""
    if not calls:
        return text
    said = {"role": "assistant", "content": text, "tool_calls": [c.to_chat() for c in calls]}
    return template_messages([said])[0]


def _for_template(place: int, call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"messages[{place}].tool_calls: arguments are no JSON") from error
    if not isinstance(arguments, dict):
        raise ValueError(f"messages[{place}].tool_calls: arguments must be an object")
    named = {"name": function["name"], "arguments": arguments}
    return {"id": call["id"], "type": "function", "function": named}


def _json(text: str) -> tuple[Any, str]:
    """The JSON value that a text begins with, and what is behind it; None where there is none."""
    begin = len(text) - len(text.lstrip())
    try:
        value, end = _JSON.raw_decode(text, begin)
    except (ValueError, RecursionError):
        return None, ""
    return value, text[end:]


def _call(value: Any) -> ToolCall | None:
    """A call of what stands where one should; None if it is none."""
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        arguments, _ = _json(arguments)
    if not isinstance(arguments, Mapping):
        return None
    said = json.dumps(arguments, ensure_ascii=False)
    return ToolCall(secrets.token_hex(_ID)[:_ID], value["name"], said)
