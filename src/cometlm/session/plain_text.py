"""Tokens of what is only text: control tokens that stand in it are spelled, not obeyed.

A tokenizer takes `<|im_end|>` in a document for the token that ends a turn. Only the frame that a
chat template puts around messages may hold such tokens; whoever wrote a document or a message must
not. So `PlainText.encode` spells them, and `escaped` marks them in what a template is given, so
that `PlainText.encode_frame` can tell them from the template's own.

Control tokens are those that the tokenizer calls special, and those of its added tokens that stand
in its chat template. Other added tokens, such as words of a domain, stay what they are.

Footguns:
    - A frame that is made of ordinary words ("[INST]", "### Human:") is text, whoever writes it.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

Spans = list[tuple[int, int]]
_PRIVATE = range(0xF8D0, 0xF8FF)  # characters that no text should have
_GUARDS = ("\n", ".", "0")


class PlainText:
    """A tokenizer for which text is only text.

    Args:
        tokenizer: of transformers, fast or slow.

    Attributes:
        tokenizer: as given.
        control: ids of its control tokens, by their text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        template = getattr(tokenizer, "chat_template", None) or ""
        literal = "\n".join(template.values()) if isinstance(template, Mapping) else str(template)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._added = {token.content: token for token in added.values()}
        # Some that a tokenizer calls special are not marked as such among those that it added.
        special = set(getattr(tokenizer, "all_special_tokens", ()))
        self.control: dict[str, int] = {
            token.content: number
            for number, token in added.items()
            if token.special or token.content in special or _frames(token.content, literal)
        }

    @classmethod
    def of(cls, tokenizer: Any) -> PlainText:
        """The one of a tokenizer: made once, until its tokens or its chat template change."""
        state = (num_tokens(tokenizer), str(getattr(tokenizer, "chat_template", None)))
        known = _KNOWN.get(tokenizer)
        if known is None or known[0] != state:
            known = _KNOWN[tokenizer] = (state, cls(tokenizer))
        return known[1]

    def encode(self, text: str) -> list[int]:
        """Ids of text, without special tokens around it."""
        return self.encode_with_spans(text)[0]

    def encode_with_spans(self, text: str) -> tuple[list[int], Spans]:
        """Ids of text, and where in it each one's characters stand.

        A slow tokenizer has no such places: its spans are empty.
        """
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        if not getattr(self.tokenizer, "is_fast", False):
            return self._encode_slowly(text, options), []
        encoded = self.tokenizer(text, return_offsets_mapping=True, **options)
        ids, spans = list(encoded["input_ids"]), list(encoded["offset_mapping"])
        if self._ids.isdisjoint(ids):
            return ids, spans
        return self._spell(text, ids, spans)

    def encode_frame(self, text: str, mark: str) -> list[int]:
        """Ids of what a chat template rendered, whose control tokens count.

        Args:
            text: with the control tokens of what it was given marked (`escaped`).
            mark: with this character.
        """
        live = {"add_special_tokens": False, "split_special_tokens": False, "verbose": False}
        ids: list[int] = []
        if mark not in text:
            ids += self.tokenizer(text, **live)["input_ids"]
            return ids
        for part, is_plain in self._parts(text, mark):
            if is_plain:
                ids += self.encode_in_the_middle(part) if ids else self.encode(part)
            else:
                ids += self.tokenizer(part, **live)["input_ids"]
        return ids

    def encode_in_the_middle(self, text: str) -> list[int]:
        """Ids of text behind other tokens: without the space that some put in front of a text."""
        ids = self.encode(text)
        if not self._begins_otherwise:
            return ids
        return self._behind_a_guard(self.encode, text) or ids

    def escaped(self, given: Any, mark: str) -> Any:
        """Messages, tools or the like, with `mark` behind the first character of control tokens."""
        if isinstance(given, str):
            return self._pattern.sub(lambda found: found[0][0] + mark + found[0][1:], given)
        if isinstance(given, Mapping):
            return {
                self.escaped(name, mark): self.escaped(value, mark) for name, value in given.items()
            }
        if isinstance(given, (list, tuple)):
            return [self.escaped(value, mark) for value in given]
        return given

    # --- inside -----------------------------------------------------------------------------

    @cached_property
    def _ids(self) -> frozenset[int]:
        return frozenset(self.control.values())

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(_any_of(self.control))

    @cached_property
    def _begins_otherwise(self) -> bool:
        """Whether a text begins otherwise than it goes on behind a control token."""
        for content in self.control:
            token = self._added[content]
            if not (token.lstrip or token.rstrip):
                behind = self.tokenizer(
                    content + "a", add_special_tokens=False, split_special_tokens=False
                )["input_ids"]
                return list(behind[1:]) != self.encode("a")
        return False

    def _parts(self, text: str, mark: str) -> list[tuple[str, bool]]:
        """The text in parts without marks, and whether each is to be read as plain text.

        Those are what stands between two of the frame's tokens and has a marked one.
        """
        marked = [content[0] + mark + content[1:] for content in self.control]
        pattern = re.compile(f"({_any_of(marked)})|({_any_of(self.control)})")
        borders = [(found.start(), found.end()) for found in pattern.finditer(text) if found[2]]
        edges = [(0, 0), *borders, (len(text), len(text))]
        parts: list[tuple[str, bool]] = []
        begin = 0
        for (start, end), (after, last) in pairwise(edges):
            between = text[end:after]
            if mark not in between:
                continue
            parts.append((text[begin:end], False))
            parts.append((self._stripped(between, text[start:end], text[after:last]), True))
            begin = after
        parts.append((text[begin:], False))
        return [(part.replace(mark, ""), plain) for part, plain in parts if part]

    def _stripped(self, text: str, before: str, after: str) -> str:
        """Text between two tokens without the white space that they take with them."""
        text = text.lstrip() if before and self._added[before].rstrip else text
        return text.rstrip() if after and self._added[after].lstrip else text

    def _spell(self, text: str, ids: list[int], spans: Spans) -> tuple[list[int], Spans]:
        """Control tokens that the tokenizer found in spite of what it was told, spelled."""
        spelled: list[int] = []
        places: Spans = []
        for number, (begin, end) in zip(ids, spans, strict=True):
            content = text[begin:end].strip()
            if self.control.get(content) != number:  # a byte, or an unknown word, is no such token
                spelled.append(number)
                places.append((begin, end))
                continue
            letters = self._letters(content)
            spelled += letters
            places += [(begin, end)] * len(letters)
        return spelled, places

    def _letters(self, content: str) -> list[int]:
        """Ids that spell a control token.

        Raises:
            ValueError: there are none.
        """
        for parts in ((content[:1], content[1:]), tuple(content)):
            ids = [i for part in parts if part and part != content for i in self._within(part)]
            if ids and self.control[content] not in ids:
                return ids
        raise ValueError(
            f"{type(self.tokenizer).__name__} cannot spell its control token {content!r} as text"
        )

    def _within(self, part: str) -> list[int]:
        """Ids of some letters behind others; those hold no control token."""

        def encode(text: str) -> list[int]:
            options = {"add_special_tokens": False, "split_special_tokens": True}
            return list(self.tokenizer(text, **options)["input_ids"])

        return self._behind_a_guard(encode, part) or encode(part)

    def _behind_a_guard(self, encode: Callable[[str], list[int]], text: str) -> list[int]:
        """Ids of text behind a character that does not join with it; none if each does."""
        for guard in _GUARDS:
            first, both = encode(guard), encode(guard + text)
            if both[: len(first)] == first and self.tokenizer.unk_token_id not in first:
                return both[len(first) :]
        return []

    def _encode_slowly(self, text: str, options: dict[str, Any]) -> list[int]:
        ids: list[int] = []
        for i, part in enumerate(re.split(f"({_any_of(self.control)})", text)):
            if not part:
                continue
            inside = self.tokenizer(part, **options)["input_ids"] if i % 2 == 0 else None
            ids += self._letters(part) if inside is None else inside
        return ids


_KNOWN: weakref.WeakKeyDictionary[Any, tuple[Any, PlainText]] = weakref.WeakKeyDictionary()


def num_tokens(tokenizer: Any) -> int:
    """Tokens of a tokenizer, added ones among them; 0 of one that does not say."""
    return len(tokenizer) if hasattr(type(tokenizer), "__len__") else 0


def unused_mark(given: Any) -> str:
    """A character that stands nowhere in messages, tools or the like.

    Raises:
        ValueError: all private characters that are tried stand there.
    """
    used = set().union(*map(set, _strings(given)))
    free = [chr(code) for code in _PRIVATE if chr(code) not in used]
    if not free:
        raise ValueError("messages must not hold all of Unicode's private characters")
    return free[0]


def _strings(given: Any) -> Iterator[str]:
    if isinstance(given, str):
        yield given
    elif isinstance(given, Mapping):
        for name, value in given.items():
            yield from _strings(name)
            yield from _strings(value)
    elif isinstance(given, (list, tuple)):
        for value in given:
            yield from _strings(value)


def _frames(content: str, template: str) -> bool:
    """Whether an added token stands in a chat template, as more than a letter or white space."""
    return len(content) > 1 and not content.isspace() and content in template


def _any_of(contents: Iterable[str] | Sequence[str]) -> str:
    """A pattern for any of these, the longest first."""
    longest = sorted(contents, key=len, reverse=True)
    return "|".join(map(re.escape, longest)) or "(?!)"
