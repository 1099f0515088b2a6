"""API keys: made once, shown once, and kept as hashes.

A key is 256 random bits, so one round of SHA-256 hides it; passwords would need more. The file has
a line for each key, `NAME HASH`, and may hold comments behind `#`.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Self

_LINE = re.compile(r"([\w.@-]{1,64})\s+([0-9a-f]{64})")
_OWNER = 32  # hexadecimal digits of the hash


class Keys:
    """The keys of a server.

    Args:
        hashes: of keys, by their names.
    """

    def __init__(self, hashes: Mapping[str, str]) -> None:
        self._hashes = dict(hashes)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Keys of a file.

        Raises:
            ValueError: a line that is none; a name that stands twice; no key at all.
            OSError: it cannot be read.
        """
        hashes = _hashes_in(path)
        if not hashes:
            raise ValueError(f"{path} holds no key; `cometlm key NAME --keys {path}` makes one")
        return cls(hashes)

    def owner_of(self, key: str) -> str | None:
        """What owns the sessions of a key; None: it is none of these.

        It takes as long whichever key it is, and depends on the key, not on its name.
        """
        digest, found = _hash(key), False
        for known in self._hashes.values():
            found |= hmac.compare_digest(known, digest)
        return digest[:_OWNER] if found else None


def new_key(path: str | Path, name: str) -> str:
    """Make a key and add its hash to a file, which only its owner can read if it is new.

    Returns:
        The key, which is in no file.

    Raises:
        ValueError: a name that is none, or is there already.
        OSError: the file cannot be written.
    """
    target, key = Path(path), f"sk-comet-{secrets.token_urlsafe(32)}"
    line = f"{name} {_hash(key)}"
    if not _LINE.fullmatch(line):
        raise ValueError(f"a name must be 1 … 64 letters, digits or any of . _ @ -, got {name!r}")
    if not target.exists():
        target.touch(mode=0o600)
    elif name in _hashes_in(target):
        raise ValueError(f"{path} has a key of the name {name!r} already")
    ended = target.read_bytes()[-1:] in (b"", b"\n")  # by hand a last line may be without its end
    with target.open("a", encoding="utf-8") as file:
        file.write(f"{'' if ended else chr(10)}{line}\n")
    return key


def _hashes_in(path: str | Path) -> dict[str, str]:
    """Hashes of a file's keys, by name.

    Raises:
        ValueError: a line that is none; a name that stands twice.
        OSError: it cannot be read.
    """
    hashes: dict[str, str] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        said = line.partition("#")[0].strip()
        if not said:
            continue
        found = _LINE.fullmatch(said)
        if not found or found[1] in hashes:
            why = "its name stands twice" if found else "it is no `NAME HASH`"
            raise ValueError(f"{path}, line {number}: {why}")
        hashes[found[1]] = found[2]
    return hashes


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
