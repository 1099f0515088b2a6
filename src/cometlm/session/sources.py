"""What a session is given to read, as text and token ids in their order.

What has one meaning is taken. The rest is refused by name, before anything of it is read where
that can be known.
"""

from __future__ import annotations

import io
import itertools
import operator
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Any, cast

import torch
from torch import Tensor

from cometlm.text_file import UTF8, cut_blocks, read_blocks

Ids = Sequence[int] | Tensor
Plain = str | bytes | os.PathLike[str] | IO[str] | IO[bytes] | Ids | Mapping[str, Any]
Source = Plain | Iterable[Plain]

_IDS_AT_A_TIME = 65536  # taken from a tensor
_BYTES = ("B", "b", "c")  # formats of a memoryview of bytes
_TAKEN = (
    "text, token ids, a path, an open file, what a tokenizer gives for one text, or an iterable of "
    "these"
)


def pieces(source: Source, encoding: str = UTF8) -> Iterator[str | list[int]]:
    """Text in blocks and token ids in lists, in their order.

    Args:
        source: text; bytes of text; a path or an open file; token ids as a sequence, an array or a
            tensor [N] or [1, N]; a mapping with the `input_ids` of one text; an iterable of these,
            in which bytes that follow each other are one text, cut anywhere.
        encoding: of bytes, and of files that were not opened as text.

    Raises:
        ValueError: something else.
        OSError: a file cannot be read.
    """
    given: Any = source
    if isinstance(given, str):
        yield from cut_blocks(given)
    elif _is_bytes(given):
        yield from read_blocks(io.BytesIO(given), "the bytes", encoding)
    elif isinstance(given, memoryview):
        yield from pieces(given.tolist(), encoding)
    elif isinstance(given, os.PathLike):
        with open(given, "rb") as file:
            yield from read_blocks(file, os.fspath(given), encoding)
    elif isinstance(given, Mapping):
        yield from pieces(_only_row(given), encoding)
    elif _is_file(given):
        yield from read_blocks(given, str(getattr(given, "name", None) or "the file"), encoding)
    elif _is_array(given):
        yield from _of_array(given, encoding)
    elif isinstance(given, Sequence) and given and set(map(type, given)) == {int}:
        yield list(given)
    else:
        yield from _of_iterable(given, encoding)


def _of_iterable(given: Any, encoding: str) -> Iterator[str | list[int]]:
    _check(given, "read()")
    if isinstance(given, Sequence):  # what can be looked at twice is refused before it is begun
        for i, item in enumerate(given):
            if not _is_id(item):
                _check(item, f"item {i} of what read()")
    for is_bytes, items in itertools.groupby(enumerate(given), lambda one: _is_bytes(one[1])):
        if is_bytes:  # as a download gives them: they may be cut anywhere
            joined = cast("IO[bytes]", _Joined(item for _, item in items))
            yield from read_blocks(joined, "the bytes", encoding)
            continue
        for i, item in items:
            if _is_id(item):
                yield [operator.index(item)]
            else:
                _check(item, f"item {i} of what read()")
                yield from pieces(item, encoding)


class _Joined:
    """Bytes in pieces as one file, which gives what has come."""

    def __init__(self, parts: Iterable[bytes | bytearray | memoryview]) -> None:
        self._parts = iter(parts)

    def read(self, size: int) -> bytes:
        """The next piece that is not empty, of any size; at the end none."""
        return next((bytes(part) for part in self._parts if len(part)), b"") if size else b""


def _check(given: Any, where: str) -> None:
    """Refuse what cannot be read."""
    if isinstance(given, Mapping):
        if {"role", "content"} <= given.keys():
            raise ValueError(f"{where} got is a message of a chat: ask() and chat() take messages")
        if "input_ids" not in given:
            raise ValueError(f"{where} got is a {type(given).__name__} without input_ids")
    elif isinstance(given, (set, frozenset)):
        raise ValueError(f"{where} got is a {type(given).__name__}, which has no order")
    elif not (isinstance(given, (Iterable, os.PathLike)) or _is_array(given) or _is_file(given)):
        shown = reprlib.repr(given)
        raise ValueError(f"{where} got is {shown}, a {type(given).__name__}; give {_TAKEN}")


def _is_bytes(given: Any) -> bool:
    if isinstance(given, memoryview):
        return given.format in _BYTES
    return isinstance(given, (bytes, bytearray))


def _is_file(given: Any) -> bool:
    return hasattr(given, "read")


def _is_id(given: Any) -> bool:
    """Whether this is a whole number, of Python, NumPy or torch; truth values are none."""
    if isinstance(given, (bool, str)) or getattr(given, "ndim", None):
        return False
    if _is_array(given) and not _holds_ids(given):
        return False
    try:
        operator.index(given)
    except TypeError:
        return False
    return True


def _is_array(given: Any) -> bool:
    return hasattr(given, "__array__")


def _holds_ids(array: Any) -> bool:
    if isinstance(array, Tensor):
        fractional = array.is_floating_point() or array.is_complex()
        return not fractional and array.dtype != torch.bool
    return getattr(array.dtype, "kind", "O") in "iu"


def _of_array(array: Any, encoding: str) -> Iterator[str | list[int]]:
    """Ids of an array or tensor of one row; of an array of texts, the texts."""
    if not hasattr(array, "dtype") or not hasattr(array, "reshape"):
        array = array.__array__()  # a column or a table of another library's
    if isinstance(array, Tensor) and (array.is_meta or array.layout != torch.strided):
        what = "on the device meta" if array.is_meta else f"of layout {array.layout}"
        raise ValueError(f"token ids must be there, got a tensor {what}")
    shape = list(array.shape)
    is_text = getattr(array.dtype, "kind", "") in ("O", "S", "U", "T")
    if is_text and len(shape) == 1:
        yield from pieces(list(array), encoding)
        return
    if not is_text and not _holds_ids(array):
        raise ValueError(
            f"token ids must be whole numbers, got {type(array).__name__} of {array.dtype}"
        )
    if is_text or len(shape) > 2 or (len(shape) == 2 and shape[0] != 1):
        raise ValueError(
            f"token ids must be those of one text, [N] or [1, N], got {type(array).__name__} of "
            f"shape {shape}"
        )
    if getattr(array, "mask", False) is not False and array.mask.any():
        raise ValueError("token ids must be there, got an array in which some are masked")
    flat = array.reshape(-1)
    for begin in range(0, len(flat), _IDS_AT_A_TIME):
        yield [int(token) for token in flat[begin : begin + _IDS_AT_A_TIME].tolist()]


def _only_row(given: Mapping[str, Any]) -> Source:
    """The ids of what a tokenizer gave, if they are those of one text without padding."""
    _check(given, "what read()")
    ids, mask = given["input_ids"], given.get("attention_mask")
    if isinstance(ids, Sequence) and ids and not _is_id(ids[0]):
        if len(ids) > 1:
            raise ValueError(f"input_ids must be those of one text, got those of {len(ids)}")
        ids = ids[0]
    if mask is not None:
        values = list(_flat(mask))
        if not all(values):
            raise ValueError("input_ids must be without padding, got an attention_mask with zeros")
        if len(values) != sum(1 for _ in _flat(ids)):
            raise ValueError(f"attention_mask must be as long as input_ids, got {len(values)}")
    return cast("Source", ids)


def _flat(values: Any) -> Iterator[Any]:
    rows = values.tolist() if hasattr(values, "tolist") else values
    for row in rows:
        if isinstance(row, Sequence):
            yield from row
        else:
            yield row
