"""Files: written so that they are whole or not there at all, and weights read from them."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


def write_whole(path: Path, data: bytes) -> None:
    """Write beside, sync and rename: `path` holds the old bytes or the new ones, never a part.

    Raises:
        OSError: the disk is full, the folder is missing, or the like.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "its folder does not exist", str(path))
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    if hasattr(os, "O_DIRECTORY"):  # the rename itself; not possible on Windows
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: it is damaged, or something else.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or a damaged one: {error}") from error


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
