"""Items of OpenAI's Responses API: what clients send, and the chat messages that they are."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from cometlm.serve.errors import ApiError, unsupported
from cometlm.serve.schema import check_messages

_OWN = ("type", "id", "status")  # of an item, and of no message


def items_of(given: str | Sequence[dict[str, Any]], param: str = "input") -> list[dict[str, Any]]:
    """What a client sent, as a list of items with ids.

    Args:
        given: a text, or messages.
        param: what the client calls it.

    Raises:
        ApiError: items of another kind.
    """
    if isinstance(given, str):
        given = [{"role": "user", "content": [{"type": "input_text", "text": given}]}]
    for i, item in enumerate(given):
        kind = item.get("type", "message")
        if kind != "message":
            where = f"{param}[{i}]"
            raise unsupported(where, f"items of type {kind!r:.40} are not supported, only messages")
    check_messages([{k: v for k, v in item.items() if k not in _OWN} for item in given], param)
    return [
        {
            "id": item["id"] if isinstance(item.get("id"), str) else new_item_id(),
            "type": "message",
            "status": "completed",
            "role": item["role"],
            "content": _parts(item["role"], item["content"]),
        }
        for item in given
    ]


def messages_of(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Items as messages of a chat."""
    return [
        {"role": item["role"], "content": "".join(part["text"] for part in item["content"])}
        for item in items
    ]


def new_item_id() -> str:
    """An id for an item that came without one."""
    return f"msg_{secrets.token_hex(12)}"


def with_own_ids(
    items: Sequence[Mapping[str, Any]], taken: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Items whose ids are none of those that are taken.

    Raises:
        ApiError: two of the items have the same id.
    """
    known = {item["id"] for item in taken}
    named = [item["id"] for item in items]
    if len(set(named)) < len(named):
        raise ApiError("items: two of them have the same id", param="items")
    return [{**item, "id": new_item_id() if item["id"] in known else item["id"]} for item in items]


def _parts(role: str, content: Any) -> list[dict[str, Any]]:
    if not isinstance(content, str):
        return [{"type": part["type"], "text": part["text"]} for part in content]
    kind = "output_text" if role == "assistant" else "input_text"
    return [{"type": kind, "text": content}]
