"""The header of a session file, read without its tensors, in memory of about the header's size.

A hostile header of a few megabytes could be a hundred times as large once it is parsed: lists of
empty objects, or one letter beyond ASCII, for which Python makes all of a text wider. So brackets
and commas outside strings are counted first, and a header has to be ASCII, as ours are.
"""

from __future__ import annotations

import json
import re
from typing import IO, Any

_MOST_MARKS = 1 << 16  # brackets and commas: a session has about ten for each tensor
# Strings in one piece, so that what they hold does not count; the last one may be cut off.
_PARTS = re.compile(r'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|([\[{,])', re.DOTALL)


def read_metadata(file: IO[bytes], nbytes: int, name: object) -> dict[str, str]:
    """The texts that stand beside the tensors of a file of safetensors; see `read_header`."""
    return read_header(file, nbytes, name)[0]


def read_header(
    file: IO[bytes], nbytes: int, name: object
) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """The texts of a file of safetensors, and what it claims of each tensor.

    Args:
        file: at its beginning; only the header is read.
        nbytes: size of the file.
        name: what messages call it.

    Returns:
        The texts by their keys; by the tensors' names their `dtype`, `shape` and `data_offsets`,
        of which only the ends were compared with the file's.

    Raises:
        ValueError: it is no such file, or cut off.
    """
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= nbytes - 8:
        raise ValueError(
            f"{name} is no session file, or a truncated one: it has {nbytes} bytes, and a header "
            f"of {length}"
        )
    try:
        header = loads(_text(file, length))
        metadata = header.pop("__metadata__", {})
        ends = [entry["data_offsets"][1] for entry in header.values()]
        texts = {key: text for key, text in metadata.items() if isinstance(text, str)}
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"{name} is no session file: its header is damaged ({error})") from error
    if max(ends, default=0) != nbytes - 8 - length:
        raise ValueError(f"{name} is no session file, or a truncated one: its tensors are cut off")
    return texts, header


def loads(text: str, most: int = _MOST_MARKS) -> Any:
    """JSON of few parts.

    Raises:
        ValueError: it is none, is nested too deeply, or has more parts.
    """
    marks = 0
    for part in _PARTS.finditer(text):
        marks += part.lastindex is not None
        if marks > most:
            raise ValueError(f"it has more than {most} parts")
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _text(file: IO[bytes], length: int) -> str:
    raw = file.read(length)
    if len(raw) != length:
        raise ValueError("it is cut off")
    return raw.decode("ascii")
