"""Session files that clients send: read by the session's own loader, and trusted in nothing.

The loader refuses what is no session of this model, by its header. A file may still claim a memory
that is not finite, or an open chunk or a waiting text without end; these are refused here, before
anything of them is used. A file takes at most twice its size of memory until it is refused or read.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from typing import IO, Any

from safetensors import safe_open

from cometlm.core.causal_lm import CometForCausalLM
from cometlm.session.file import document_of
from cometlm.session.header import read_header
from cometlm.session.session import Session
from cometlm.session.token_stream import most_waiting

_MOST_OPEN = 1 << 16  # ids of an open chunk; whole chunks are folded, so real ones are shorter


def load_upload(
    file: IO[bytes], model: CometForCausalLM, tokenizer: Any, made_by: Mapping[str, str]
) -> Session:
    """The session of an uploaded file.

    Args:
        file: the bytes; they are copied to disk, piece by piece.
        model: whose session it has to be.
        tokenizer: its tokenizer.
        made_by: the model's `session.identity.identity`.

    Raises:
        ValueError: it is no session of this model, or one that no reading leaves; no path is
            named.
    """
    with tempfile.TemporaryDirectory(prefix="cometlm-") as folder:
        path = os.path.join(folder, "upload.safetensors")
        with open(path, "wb") as copy:
            shutil.copyfileobj(file, copy)
        try:
            _check_lengths(path)
            session = Session.load(path, model, tokenizer, made_by=made_by)
            _check_finite(path)
        except ValueError as error:
            raise ValueError(str(error).replace(path, "the file")) from error
        return session


def _check_lengths(path: str) -> None:
    """Refuse an open chunk or a waiting text that no reading leaves, before they are used."""
    with open(path, "rb") as file:
        texts, tensors = read_header(file, os.path.getsize(path), path)
    shape = tensors.get("open", {}).get("shape")
    match shape:
        case [int(length)] if length <= _MOST_OPEN:
            pass
        case _:
            raise ValueError(
                f"the file's open chunk must be a list of at most {_MOST_OPEN} tokens, got "
                f"{shape!r:.80}"
            )
    waiting = len((document_of(texts, path)["stream"] or {"text": ""})["text"])
    if waiting > most_waiting():
        raise ValueError(
            f"the file's text that is not tokenised yet must have at most {most_waiting()} "
            f"characters, got {waiting}"
        )


def _check_finite(path: str) -> None:
    """Refuse a memory that is not finite; of a file whose names, shapes and dtypes are known."""
    with safe_open(path, "pt", device="cpu") as file:
        for name in file.keys():  # noqa: SIM118 (it is no mapping)
            values = file.get_tensor(name)
            # The ends of the values take no memory, unlike a mask of them; NaN is both of them.
            if values.numel() and not all(end.isfinite() for end in values.aminmax()):
                raise ValueError(f"the file's tensor {name!r:.80} is not finite")
