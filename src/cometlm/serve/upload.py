"""Session files that clients send: read by the session's own loader, and trusted in nothing.

The loader refuses what is no session of this model. A file may still claim a memory that is not
finite, or an open chunk without end; both are refused here, before anything of them is used.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open

from cometlm.core.causal_lm import CometForCausalLM
from cometlm.session.session import Session

_MOST_OPEN = 1 << 16  # ids of an open chunk; whole chunks are folded, so real ones are shorter


def load_upload(
    file: IO[bytes], model: CometForCausalLM, tokenizer: Any, made_by: Mapping[str, str]
) -> Session:
    """The session of an uploaded file.

    Args:
        file: the bytes; they are copied to disk, piece by piece.
        model: whose session it has to be.
        tokenizer: its tokenizer.
        made_by: the model's `session.file.identity`.

    Raises:
        ValueError: it is no session of this model, or one that no reading leaves; no path is
            named.
    """
    with tempfile.TemporaryDirectory(prefix="cometlm-") as folder:
        path = os.path.join(folder, "upload.safetensors")
        with open(path, "wb") as copy:
            shutil.copyfileobj(file, copy)
        try:
            _check(path)
            return Session.load(path, model, tokenizer, made_by=made_by)
        except ValueError as error:
            raise ValueError(str(error).replace(path, "the file")) from error


def _check(path: str) -> None:
    try:
        with safe_open(path, "pt", device="cpu") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                shape = opened.get_slice(name).get_shape()
                if name == "open":
                    if len(shape) != 1 or shape[0] > _MOST_OPEN:
                        raise ValueError(
                            f"the file's open chunk must be a list of at most {_MOST_OPEN} tokens, "
                            f"got {shape}"
                        )
                elif not torch.isfinite(opened.get_tensor(name)).all():
                    raise ValueError(f"the file's tensor {name!r:.80} is not finite")
    except SafetensorError as error:
        raise ValueError(f"the file is no session file, or a truncated one: {error}") from error
