"""Items of OpenAI's Responses API: what clients send, and the chat messages that they are."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from cometlm.serve.errors import ApiError, unsupported
from cometlm.serve.schema import CalledItem, OutputItem, check_message, checked
from cometlm.serve.tools import ToolCall

_OWN = ("type", "id", "status")  # of an item, and of no message


def items_of(given: str | Sequence[dict[str, Any]], param: str = "input") -> list[dict[str, Any]]:
    """What a client sent, as a list of items with ids.

    Args:
        given: a text, or messages, calls of tools and what these gave.
        param: what the client calls it.

    Raises:
        ApiError: items of another kind.
    """
    if isinstance(given, str):
        given = [{"role": "user", "content": [{"type": "input_text", "text": given}]}]
    return [_item(item, f"{param}[{i}]") for i, item in enumerate(given)]


def _item(item: dict[str, Any], where: str) -> dict[str, Any]:
    kind = item.get("type", "message")
    if not isinstance(kind, str) or kind not in _READERS:
        raise unsupported(
            where,
            f"items of type {kind!r:.40} are not supported, only {', '.join(_READERS)}",
        )
    said = {k: v for k, v in item.items() if k not in _OWN}
    name = item["id"] if isinstance(item.get("id"), str) else new_item_id(_PREFIXES[kind])
    return {"id": name, "type": kind, "status": "completed", **_READERS[kind](said, where)}


def _message(said: dict[str, Any], where: str) -> dict[str, Any]:
    if said.get("role") == "tool" or said.get("tool_calls"):
        raise unsupported(where, "send calls of tools and what they gave as items of their own")
    if said.get("name") is not None:
        raise unsupported(f"{where}.name", "items have no names; messages of chats do")
    check_message(said, where)
    return {"role": said["role"], "content": _parts(said["role"], said["content"])}


def _called(said: dict[str, Any], where: str) -> dict[str, Any]:
    return checked(CalledItem, said, where).model_dump()


def _output(said: dict[str, Any], where: str) -> dict[str, Any]:
    output = checked(OutputItem, said, where)
    check_message({"role": "user", "content": output.output}, where)
    return output.model_dump()


_READERS = {"message": _message, "function_call": _called, "function_call_output": _output}
_PREFIXES = {"message": "msg_", "function_call": "fc_", "function_call_output": "fco_"}


def messages_of(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Items as messages of a chat; calls belong to the answer that they stand behind."""
    messages: list[dict[str, Any]] = []
    for item in items:
        if item["type"] == "function_call":
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            called = {"name": item["name"], "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": called}
            messages[-1].setdefault("tool_calls", []).append(call)
        elif item["type"] == "function_call_output":
            text = _text(item["output"])
            messages.append({"role": "tool", "content": text, "tool_call_id": item["call_id"]})
        else:
            messages.append({"role": item["role"], "content": _text(item["content"])})
    return messages


def call_item(call: ToolCall) -> dict[str, Any]:
    """A call as an item."""
    return {
        "id": new_item_id("fc_"),
        "type": "function_call",
        "status": "completed",
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
    }


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def new_item_id(prefix: str = "msg_") -> str:
    """An id for an item that came without one."""
    return f"{prefix}{secrets.token_hex(12)}"


def with_own_ids(
    items: Sequence[Mapping[str, Any]], taken: Sequence[Mapping[str, Any]], param: str = "items"
) -> list[dict[str, Any]]:
    """Items whose ids are none of those that are taken.

    Raises:
        ApiError: two of the items have the same id.
    """
    known = {item["id"] for item in taken}
    named = [item["id"] for item in items]
    if len(set(named)) < len(named):
        raise ApiError(f"{param}: two of them have the same id", param=param)
    return [
        {**item, "id": new_item_id(_PREFIXES[item["type"]]) if item["id"] in known else item["id"]}
        for item in items
    ]


def _parts(role: str, content: Any) -> list[dict[str, Any]]:
    if not isinstance(content, str):
        return [{"type": part["type"], "text": part["text"]} for part in content]
    kind = "output_text" if role == "assistant" else "input_text"
    return [{"type": kind, "text": content}]
