"""How likely tokens were, as OpenAI's chats, completions and responses say it, in nats."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from cometlm.session.plain_text import PlainText
from cometlm.session.writer import Likely

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # of tokenizers that fall back to bytes
_LETTERS = {letter: byte for byte, letter in bytes_to_unicode().items()}
_UNFINISHED = "\ufffd"


def chat_logprobs(tokenizer: Any, likely: Sequence[Likely]) -> dict[str, Any]:
    """Of the tokens of a chat's answer."""
    return {"content": [_with_top(tokenizer, one) for one in likely], "refusal": None}


def response_logprobs(tokenizer: Any, likely: Sequence[Likely]) -> list[dict[str, Any]]:
    """Of the tokens of a response's text."""
    return [_with_top(tokenizer, one) for one in likely]


def event_logprobs(logprobs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What events of a response's stream say of `response_logprobs`: no bytes."""
    return [
        {
            **_without_bytes(one),
            "top_logprobs": [_without_bytes(top) for top in one["top_logprobs"]],
        }
        for one in logprobs
    ]


def completion_logprobs(tokenizer: Any, likely: Sequence[Likely], begin: int) -> dict[str, Any]:
    """Of the tokens of a completion, the first of which stands at `begin` in its text."""
    tokens = [token_text(tokenizer, one.token) for one in likely]
    offsets = [begin + sum(map(len, tokens[:i])) for i in range(len(tokens))]
    top = [{token_text(tokenizer, token): value for token, value in one.top} for one in likely]
    return {
        "tokens": tokens,
        "token_logprobs": [one.logprob for one in likely],
        "top_logprobs": top,
        "text_offset": offsets,
    }


def token_text(tokenizer: Any, token: int) -> str:
    """A token as it goes on a text; a part of a character is no text yet."""
    (*_, before) = PlainText.of(tokenizer).encode("a")
    front = str(tokenizer.decode([before]))
    return str(tokenizer.decode([before, token])).removeprefix(front)


def token_bytes(tokenizer: Any, token: int) -> list[int] | None:
    """The bytes of a token in UTF-8; None where the tokenizer does not show them."""
    text = token_text(tokenizer, token)
    if _UNFINISHED not in text:
        return list(text.encode())
    piece = str(tokenizer.convert_ids_to_tokens(token))
    if found := _BYTE.fullmatch(piece):
        return [int(found[1], 16)]
    return [_LETTERS[c] for c in piece] if all(c in _LETTERS for c in piece) else None


def _with_top(tokenizer: Any, one: Likely) -> dict[str, Any]:
    top = [_told(tokenizer, *other) for other in one.top]
    return {**_told(tokenizer, one.token, one.logprob), "top_logprobs": top}


def _without_bytes(told: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in told.items() if name != "bytes"}


def _told(tokenizer: Any, token: int, logprob: float) -> dict[str, Any]:
    text = token_text(tokenizer, token)
    return {"token": text, "logprob": logprob, "bytes": token_bytes(tokenizer, token)}
