"""Text out of files, bytes and pipes: decoded as it comes.

What is no text is refused, with the place where it is none. Line ends become one newline, as
Python's own text files have them, and a byte-order mark in front is dropped. A pipe gives what has
come; nothing waits until a block is full.
"""

from __future__ import annotations

import codecs
import contextlib
import io
from collections.abc import Iterator
from typing import IO, Any, cast

_BLOCK = 16384  # characters taken at a time: tokenising needs many times their size in memory
_BYTES = 8192  # bytes taken at a time
_MARK = "\ufeff"
UTF8 = "utf-8"
# Byte-order marks of other encodings; the longer ones first, since one begins like another.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def check_encoding(encoding: str) -> str:
    """The encoding, if text can have it.

    Raises:
        ValueError: Python knows no such encoding of text.
    """
    try:
        "".encode(encoding)
    except (LookupError, TypeError) as error:
        raise ValueError(f"encoding must be one that Python knows, got {encoding!r}") from error
    return encoding


def cut_blocks(text: str) -> Iterator[str]:
    """A string block by block, so that a long one is not tokenised at once."""
    for start in range(0, len(text), _BLOCK):
        yield text[start : start + _BLOCK]


def read_blocks(file: IO[Any], name: str, encoding: str = UTF8) -> Iterator[str]:
    """Text of an open file block by block.

    Args:
        file: opened as text or as bytes.
        name: what errors call it.
        encoding: of a file of bytes; one opened as text has its own.

    Raises:
        ValueError: it holds something else than text; names byte and line, where they are known.
    """
    is_binary = isinstance(file.read(0), bytes)
    blocks = _decoded(file, name, check_encoding(encoding)) if is_binary else _lines(file, name)
    line = 1
    first = True
    for block in blocks:
        if "\0" in block:
            at = line + block.count("\n", 0, block.index("\0"))
            raise ValueError(f"{name} is not text: it holds a zero byte in line {at}")
        line += block.count("\n")
        text = block.removeprefix(_MARK) if first else block
        first = False
        yield from cut_blocks(text)


def read_text(path: Any, encoding: str = UTF8) -> str:
    """All text of a file.

    Raises:
        ValueError: as `read_blocks`.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        return "".join(read_blocks(file, str(path), encoding))


def _decoded(file: IO[bytes], name: str, encoding: str) -> Iterator[str]:
    """Text of a file of bytes; what stands in front of a wrong byte is given before the error."""
    decoder = codecs.getincrementaldecoder(encoding)()
    lines = io.IncrementalNewlineDecoder(None, translate=True)
    read = getattr(file, "read1", None) or file.read  # the first gives what has come
    taken, line = 0, 1
    while True:
        block = cast("bytes", read(_BYTES))
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            # The error's bytes may begin with some that the decoder kept from the block before.
            begin = taken + len(block) - len(error.object)
            before = error.object[: error.start].decode(error.encoding, errors="replace")
            if before := lines.decode(before, final=True):
                yield before
            where = f"byte {begin + error.start + 1}, in line {line + before.count(chr(10))}"
            raise ValueError(_not_text(name, encoding, error, where)) from error
        taken += len(block)
        text = lines.decode(text, final=not block)
        line += text.count("\n")
        if text:
            yield text
        if not block:
            return


def _lines(file: IO[str], name: str) -> Iterator[str]:
    """Text of a file that was opened as text; line by line where it would wait for more."""
    waits = not _is_seekable(file) and hasattr(file, "readline")
    read = file.readline if waits else file.read
    while True:
        try:
            block = read(_BLOCK)
        except UnicodeDecodeError as error:
            encoding = getattr(file, "encoding", None) or error.encoding
            raise ValueError(_not_text(name, encoding, error, _place(file, error))) from error
        if not isinstance(block, str):
            raise ValueError(f"{name} must give text, got {type(block).__name__}")
        if not block:
            return
        yield block


def _is_seekable(file: IO[str]) -> bool:
    try:
        return file.seekable()
    except (AttributeError, ValueError, OSError):
        return True  # whatever it is, it is no pipe of the system's


def _place(file: Any, error: UnicodeDecodeError) -> str:
    """Where a file opened as text has its wrong byte, if it can be gone through again."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        buffer = file.buffer
        at = buffer.tell() - len(error.object) + error.start
        buffer.seek(0)
        line = 1
        for begin in range(0, at, _BYTES):
            line += buffer.read(min(_BYTES, at - begin)).count(b"\n")
        return f"byte {at + 1}, in line {line}"
    return "a byte"


def _not_text(name: str, encoding: str, error: UnicodeDecodeError, where: str) -> str:
    shown = "UTF-8" if codecs.lookup(encoding).name == "utf-8" else encoding
    marked = (other for mark, other in _MARKS.items() if error.object.startswith(mark))
    hint = next((f"it begins as {other} does" for other in marked), "is it in another encoding?")
    bad = error.object[error.start : error.start + 1].hex()
    return f"{name} is not {shown} text: {where}, is 0x{bad} ({error.reason}); {hint}"
