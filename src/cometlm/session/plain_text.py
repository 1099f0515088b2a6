"""Tokens of what is only text: control tokens that stand in it are spelled, not obeyed.

A tokenizer takes `<|im_end|>` in a document for the token that ends a turn. Only the frame that a
chat template puts around messages may hold such tokens; whoever wrote a document or a message must
not. So `PlainText.encode` spells them, and `escaped` marks them in what a template is given, so
that `PlainText.encode_frame` can tell them from the template's own.

Control tokens are those that the tokenizer calls special, and those of its added tokens that its
chat template writes. Other added tokens, such as words of a domain, stay what they are.

Pitfalls:
    - A frame that is made of ordinary words ("[INST]", "### Human:") is text, whoever writes it.
      So is a word that was added as a token and is not called special, such as "user".
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

from jinja2 import Environment, TemplateSyntaxError

from cometlm.session.frame_parts import FrameParts

Spans = list[tuple[int, int]]
_PRIVATE = range(0xF8D0, 0xF8FF)  # characters that no text should have
_GUARDS = ("\n", ".", "0")
# Whether control tokens count is written into the tokenizer itself, which threads share.
ENCODING = threading.RLock()


def encoded(tokenizer: Any, text: str | list[str], *, special: bool, **options: Any) -> Any:
    """What a tokenizer makes of a text or several, without special tokens around it.

    Args:
        special: control tokens that are written in it count as such.
        options: others of the tokenizer's.
    """
    with ENCODING:
        return tokenizer(
            text,
            add_special_tokens=False,
            split_special_tokens=not special,
            verbose=False,
            **options,
        )


def encoded_with_spans(tokenizer: Any, text: str, *, special: bool) -> tuple[list[int], Spans]:
    """Ids of a text and where in it each one's characters stand; a slow tokenizer has no spans."""
    if not getattr(tokenizer, "is_fast", False):
        return list(encoded(tokenizer, text, special=special)["input_ids"]), []
    found = encoded(tokenizer, text, special=special, return_offsets_mapping=True)
    return list(found["input_ids"]), list(found["offset_mapping"])


def prefix_ids(tokenizer: Any) -> list[int]:
    """Special tokens that a tokenizer puts in front of a text."""
    with ENCODING:
        ids = list(tokenizer("")["input_ids"])
    eos = tokenizer.eos_token_id
    return ids[:-1] if ids and ids[-1] == eos and eos != tokenizer.bos_token_id else ids


class PlainText:
    """A tokenizer for which text is only text.

    Args:
        tokenizer: of transformers, fast or slow.

    Attributes:
        tokenizer: as given.
        control: ids of its control tokens, by their text.
        special: those that the tokenizer calls special.
        num_tokens: how many tokens it has.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        template = getattr(tokenizer, "chat_template", None) or ""
        sources = template.values() if isinstance(template, Mapping) else [str(template)]
        literal = [text for source in sources for text in _literals(source)]
        self.num_tokens = num_tokens(tokenizer)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._added = {token.content: token for token in added.values()}
        self._is_fast = bool(getattr(tokenizer, "is_fast", False))
        self._frame_parts = FrameParts(added, self._encode_each)
        # Some that a tokenizer calls special are not marked as such among those that it added.
        special = set(getattr(tokenizer, "all_special_tokens", ()))
        special |= {token.content for token in added.values() if token.special}
        self.special = frozenset(special)
        self.control: dict[str, int] = {
            token.content: number
            for number, token in added.items()
            if token.content in special or _frames(token.content, literal)
        }

    @classmethod
    def of(cls, tokenizer: Any) -> PlainText:
        """The one of a tokenizer: made once, until its tokens or its chat template change."""
        return _known(
            tokenizer, num_tokens(tokenizer), str(getattr(tokenizer, "chat_template", None))
        )

    def encode(self, text: str) -> list[int]:
        """Ids of text, without special tokens around it."""
        return self.encode_with_spans(text)[0]

    def encode_with_spans(self, text: str) -> tuple[list[int], Spans]:
        """Ids of text, and where in it each one's characters stand.

        A slow tokenizer has no such places: its spans are empty.
        """
        if not self._is_fast:
            return self._encode_slowly(text), []
        ids, spans = encoded_with_spans(self.tokenizer, text, special=False)
        if self._ids.isdisjoint(ids):
            return ids, spans
        return self._spell(text, ids, spans)

    def encode_frame(self, text: str, mark: str) -> list[int]:
        """Ids of what a chat template rendered, whose control tokens count.

        Args:
            text: with the control tokens of what it was given marked (`escaped`).
            mark: with this character.
        """
        if mark in text or self.takes_alike or not self._is_fast:
            return self.encode_frame_with_spans(text, mark)[0]
        return self._frame_parts.encode(text)

    def encode_frame_with_spans(self, text: str, mark: str) -> tuple[list[int], Spans]:
        """The same, and where in the marked text each one's characters stand, as elsewhere."""
        ids: list[int] = []
        spans: Spans = []
        for begin, end, is_plain in self._parts(text, mark):
            places = [i for i in range(begin, end) if not is_plain or text[i] != mark]
            part = "".join(text[i] for i in places)
            if not is_plain:
                own, where = self._encode_as_written(part)
            else:
                own, where = (
                    self._encode_in_the_middle(part) if ids else self.encode_with_spans(part)
                )
            ids += own
            spans += [
                (places[first], places[last - 1] + 1) if last > first else (begin, begin)
                for first, last in where
            ]
        return ids, spans

    def escaped(self, given: Any, mark: str, control: Iterable[str] | None = None) -> Any:
        """Messages, tools or the like, with `mark` behind the first character of control tokens.

        Args:
            given: strings, and mappings and sequences of them.
            mark: stands nowhere in it (`unused_mark`).
            control: those that are marked; None: all.
        """
        pattern = self._pattern if control is None else re.compile(_any_of(control))
        if isinstance(given, str):
            return pattern.sub(lambda found: found[0][0] + mark + found[0][1:], given)
        if isinstance(given, Mapping):
            # A template looks for names; those that it cannot look for are somebody's data.
            return {
                (
                    name
                    if isinstance(name, str) and name.isidentifier()
                    else self.escaped(name, mark, control)
                ): self.escaped(value, mark, control)
                for name, value in given.items()
            }
        if isinstance(given, (list, tuple)):
            return [self.escaped(value, mark, control) for value in given]
        return given

    @cached_property
    def takes_alike(self) -> bool:
        """Whether the tokenizer takes other letters for a control token: wide ones, capitals.

        It does where it changes letters before it looks for such tokens.
        """
        inner = getattr(self.tokenizer, "backend_tokenizer", None)
        changes = getattr(inner, "normalizer", None) is not None
        return changes and any(self._added[content].normalized for content in self.control)

    # --- inside -----------------------------------------------------------------------------

    def _encode_each(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = encoded(self.tokenizer, texts, special=True)["input_ids"]
        return ids

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
                behind = encoded(self.tokenizer, content + "a", special=True)["input_ids"]
                return list(behind[1:]) != self.encode("a")
        return False

    def _parts(self, text: str, mark: str) -> Iterator[tuple[int, int, bool]]:
        """Where the parts of a text begin and end, and whether each is to be read as plain text.

        Those are what stands between two of the frame's tokens and has a mark.
        """
        marked = [content[0] + mark + content[1:] for content in self.control]
        pattern = re.compile(f"({_any_of(marked)})|({_any_of(self.control)})")
        borders = [(found.start(), found.end()) for found in pattern.finditer(text) if found[2]]
        edges = [(0, 0), *borders, (len(text), len(text))] if mark in text else []
        begin = 0
        for (start, end), (after, last) in pairwise(edges):
            if mark in text[end:after]:
                if end > begin:
                    yield begin, end, False
                before, behind = self._added.get(text[start:end]), self._added.get(text[after:last])
                inner = text[end:after]
                # Some tokens take the white space beside them with them.
                left = len(inner) - len(inner.lstrip()) if before and before.rstrip else 0
                right = len(inner) - len(inner.rstrip()) if behind and behind.lstrip else 0
                yield end + left, after - right, True
                begin = after
        if len(text) > begin:
            yield begin, len(text), False

    def _encode_as_written(self, text: str) -> tuple[list[int], Spans]:
        """Ids of text whose control tokens count, where they are written as they are called.

        No mark stands in those that are only alike.
        """
        ids, spans = encoded_with_spans(self.tokenizer, text, special=True)
        if not (self.takes_alike and spans):
            return ids, spans
        own: list[int] = []
        where: Spans = []
        for number, (first, last) in zip(ids, spans, strict=True):
            written = text[first:last].strip()
            is_control = number in self._ids and number != self.tokenizer.unk_token_id
            if not is_control or self.control.get(written) == number or not written:
                own.append(number)
                where.append((first, last))
                continue
            plain, places = self._encode_in_the_middle(text[first:last])
            own += plain
            where += [(first + left, first + right) for left, right in places]
        return own, where

    def _encode_in_the_middle(self, text: str) -> tuple[list[int], Spans]:
        ids, spans = self.encode_with_spans(text)
        if not self._begins_otherwise:
            return ids, spans
        for guard in _GUARDS:
            first, (both, places) = self.encode(guard), self.encode_with_spans(guard + text)
            if both[: len(first)] == first and self.tokenizer.unk_token_id not in first:
                shifted = [(begin - 1, end - 1) for begin, end in places[len(first) :]]
                return both[len(first) :], shifted
        return ids, spans

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
            return list(encoded(self.tokenizer, text, special=False)["input_ids"])

        return self._behind_a_guard(encode, part) or encode(part)

    def _behind_a_guard(self, encode: Callable[[str], list[int]], text: str) -> list[int]:
        """Ids of text behind a character that does not join with it; none if each does."""
        for guard in _GUARDS:
            first, both = encode(guard), encode(guard + text)
            if both[: len(first)] == first and self.tokenizer.unk_token_id not in first:
                return both[len(first) :]
        return []

    def _encode_slowly(self, text: str) -> list[int]:
        ids: list[int] = []
        for i, part in enumerate(re.split(f"({_any_of(self.control)})", text)):
            if part and i % 2:
                ids += self._letters(part)
            elif part:
                ids += encoded(self.tokenizer, part, special=False)["input_ids"]
        return ids


@lru_cache(maxsize=16)
def _known(tokenizer: Any, tokens: int, template: str) -> PlainText:
    """Of a tokenizer, as it is with so many tokens and that chat template."""
    return PlainText(tokenizer)


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


def _literals(template: str) -> list[str]:
    """What a chat template may write itself: its text, and strings in its code."""
    try:
        tokens = list(Environment().lexer.tokenize(template))
    except TemplateSyntaxError:  # it renders nothing, and whoever renders it says so
        return []
    return [str(token.value) for token in tokens if token.type in ("data", "string")]


def _frames(content: str, literal: Iterable[str]) -> bool:
    """Whether an added token stands in one of these texts as such: as no letter, word or part."""
    if len(content) < 2 or content.isspace() or content.isidentifier():
        return False
    before = r"(?<!\w)" if content[0].isalnum() else ""
    behind = r"(?!\w)" if content[-1].isalnum() else ""
    pattern = re.compile(before + re.escape(content) + behind)
    return any(pattern.search(text) for text in literal)


def _any_of(contents: Iterable[str] | Sequence[str]) -> str:
    """A pattern for any of these, the longest first."""
    longest = sorted(contents, key=len, reverse=True)
    return "|".join(map(re.escape, longest)) or "(?!)"
