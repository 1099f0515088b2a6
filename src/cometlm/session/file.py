"""The session file: safetensors with one JSON document as metadata, and nothing that runs.

Tensors: `state.{layer}` [1, M, D] and `entries.{layer}` [1, n, E] as `LayerMemory` holds them,
`own.{layer}.{name}` as `LayerState` holds a layer's own state, and `open` [n], the token ids of the
open chunk, its overlap among them. The document (metadata key `cometlm`) says the rest: chunks
folded, the end of the text that is not tokenised yet, which weights, settings and sizes made the
memory, and which library wrote it. safetensors checks shapes, offsets and lengths against the file
before anything is allocated; what it cannot know is checked here, also before a tensor is read.
Whoever saves may note something beside it (metadata key `notes`). A SHA-256 of it all (`digest` in
the document; older files have none) tells one that has rotted.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from cometlm import __version__
from cometlm.backbones.families import device_of
from cometlm.checkpoints.atomic_write import write_whole
from cometlm.checkpoints.backbones import Bits, bits_of
from cometlm.checkpoints.source import kind_of
from cometlm.config import CometConfig
from cometlm.core.cache import CometCache
from cometlm.core.causal_lm import CometForCausalLM
from cometlm.core.layout import RowCounts
from cometlm.core.memory import LayerMemory
from cometlm.core.state import LayerState
from cometlm.session.header import loads, read_metadata
from cometlm.session.identity import SETTINGS, difference, identity, is_settings, is_sizes

FORMAT = 1
_KEY = "cometlm"
_NOTES = "notes"
_DIGEST = "digest"
MOST_NOTED = 64 << 20  # bytes of notes: safetensors takes a header of 100 MB, and escapes it again
_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class NotesError(OSError):
    """What is to be noted beside a session is more than its file takes."""


@dataclass(frozen=True)
class SessionState:
    """What a file keeps of a session.

    Attributes:
        cache: the memory at a chunk border, of one row.
        open: token ids of the open chunk.
        turns: chat turns so far.
        characters: characters of text read so far.
        digest: SHA-256 of them (`Place.digest`); None where it is not known.
        stream: text that is not tokenised yet (`TokenStream.state`), or None.
    """

    cache: CometCache
    open: tuple[int, ...]
    turns: int
    characters: int
    digest: str | None
    stream: dict[str, Any] | None


def save(
    path: str | Path,
    session: SessionState,
    model: CometForCausalLM,
    *,
    notes: Mapping[str, Any] | None = None,
    made_by: Mapping[str, str] | None = None,
) -> None:
    """Write a file that appears whole or not at all; a link stays one.

    Args:
        path: where to.
        session: what is kept.
        model: that made it.
        notes: JSON values that stand in the file beside the session, see `read_notes`.
        made_by: the model's `identity`, if it is known.

    Raises:
        ValueError: a pipe or a device.
        OSError: it cannot be written (`NotesError`: for its notes); an older file of that name is
            as it was.
    """
    target = _resolved(path)
    (row,) = session.cache.rows
    assert row.items == 0, "a session is saved at a chunk border"
    document = {
        "format": FORMAT,
        "version": __version__,
        "made_by": dict(made_by or identity(model)),
        "model": describe_model(model),
        "folds": row.folds,
        "entries": row.entries,
        "tokens": row.tokens,
        "turns": session.turns,
        "characters": session.characters,
        "stream": session.stream,
    }
    if session.digest is not None:
        document["text"] = session.digest
    tensors = {"open": torch.tensor(session.open, dtype=torch.int64)}
    for i, layer in enumerate(session.cache.layers):
        if layer.memory.state is not None:
            tensors[f"state.{i}"] = layer.memory.state
        if layer.memory.entries:
            tensors[f"entries.{i}"] = torch.cat(layer.memory.entries, dim=1)
        tensors |= {f"own.{i}.{name}": x for name, x in layer.own.items()}
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {_KEY: json.dumps(document)}
    if notes is not None:
        metadata[_NOTES] = noted(notes)
    document[_DIGEST] = _digest(metadata, plain)
    metadata[_KEY] = json.dumps(document)
    write_whole(target, to_bytes(plain, metadata))


def noted(notes: Mapping[str, Any]) -> str:
    """Notes as a file has them.

    Raises:
        NotesError: they are more than it takes.
    """
    text = json.dumps(dict(notes))
    taken = len(text) + text.count("\\") + text.count('"')  # these are escaped again
    if taken > MOST_NOTED:
        raise NotesError(
            errno.EFBIG,
            f"what is noted beside a session may take {MOST_NOTED} bytes of its file, got {taken}",
        )
    return text


def check_target(path: Path) -> None:
    """Refuse to write a session where it cannot be, or over something else.

    Raises:
        ValueError: a directory, a pipe or a device; a folder that is missing or cannot be written
            to; a file that is no session.
        OSError: what stands there cannot be read.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a directory; name a file")
    target = _resolved(path)
    if not os.access(target.parent, os.W_OK):
        raise ValueError(f"{path}: its folder is missing or cannot be written to")
    if target.exists() and target.stat().st_size:
        try:
            read_document(target)
        except ValueError as error:
            raise ValueError(
                f"{path} is there, and no session would be written over it: {error}; name another "
                "file, or remove this one"
            ) from error


def _resolved(path: str | Path) -> Path:
    """The file that a path leads to over links; it is there as a plain file, or not at all."""
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file() and not target.is_dir():
        raise ValueError(f"{path} is a pipe, a device or the like; name a file")
    return target


def load(
    path: str | Path, model: CometForCausalLM, *, made_by: Mapping[str, str] | None = None
) -> SessionState:
    """Read a file back for the model that made it.

    Args:
        path: of the file.
        model: that made it.
        made_by: the model's `identity`, if it is known.

    Raises:
        ValueError: it is no session file, damaged, or of another model; the message says which.
        OSError: it cannot be read.
    """
    metadata = _metadata(path)
    document = document_of(metadata, path)
    if differs := difference(document["made_by"], made_by or identity(model)):
        raise ValueError(f"{path} is a session of another model: {differs}")
    sizes = model.config.comet_config
    row = _counts(sizes, document)
    least, most = row.folds * (sizes.overlap + 1), row.folds * sizes.chunk_size
    if row.entries > sizes.temporary_slots or not least <= row.tokens <= most:
        raise ValueError(
            f"{path} is damaged: {row.folds} chunks do not hold {row.tokens} tokens and leave "
            f"{row.entries} entries"
        )
    wanted = _wanted(model, row)
    with _opened(path) as file:
        _check_tensors(path, file, wanted)
        # Older files have no digest, nor settings; where one alone is gone, the file has rotted.
        if _DIGEST in document or SETTINGS in document["made_by"]:
            tensors = {name: file.get_tensor(name) for name in wanted}
            its_digest = document.pop(_DIGEST, None)
            if its_digest != _digest({**metadata, _KEY: json.dumps(document)}, tensors):
                raise ValueError(f"{path} is damaged: its digest is that of another content")
        ids = file.get_tensor("open").tolist()
        layers = [_layer(file, model, i, wanted) for i in range(len(model.model.cells))]
    vocabulary = model.config.vocab_size
    few = row.folds and len(ids) < sizes.overlap  # which a fold leaves open
    if few or any(not 0 <= token < vocabulary for token in ids):
        raise ValueError(f"{path} is damaged: its token ids are none of this model's")
    cache = CometCache(tuple(layers), (row,), sizes, sizes.row_length)
    return SessionState(
        cache=cache,
        open=tuple(ids),
        turns=document["turns"],
        characters=document["characters"],
        digest=document.get("text"),
        stream=document["stream"],
    )


def read_document(path: str | Path) -> dict[str, Any]:
    """The file's JSON document, checked; reads no tensor.

    Raises:
        ValueError: it is no session file, or damaged, or of a newer format.
        OSError: it cannot be read.
    """
    return document_of(_metadata(path), path)


def read_notes(path: str | Path) -> dict[str, Any]:
    """What was noted in the file when it was saved; nothing in most.

    Raises:
        ValueError: it is no file of safetensors, or damaged.
        OSError: it cannot be read.
    """
    return notes_of(_metadata(path), path)


def document_of(metadata: Mapping[str, str], name: object) -> dict[str, Any]:
    """The document among the texts of a header (`header.read_metadata`), checked.

    Raises:
        ValueError: it is no session's, or damaged, or of a newer format.
    """
    if _KEY not in metadata:
        raise ValueError(f"{name} is no cometlm session: a safetensors file of something else")
    try:
        document = loads(metadata[_KEY])
    except ValueError as error:
        raise ValueError(f"{name} is damaged: its document is no JSON ({error})") from error
    _check(name, document)
    return dict(document)


def notes_of(metadata: Mapping[str, str], name: object) -> dict[str, Any]:
    """The notes among the texts of a header (`header.read_metadata`).

    Raises:
        ValueError: they are damaged.
    """
    try:
        notes = json.loads(metadata.get(_NOTES, "{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is damaged: its notes are no JSON ({error})") from error
    if not isinstance(notes, dict):
        raise ValueError(f"{name} is damaged: its notes are a {type(notes).__name__}")
    return notes


def describe_model(model: CometForCausalLM) -> dict[str, str]:
    """How `cometlm.load` makes the model again: name or path, dtype, sizes and quantization."""
    name = model.config.name_or_path or model.config.backbone
    made = {
        "name": str(Path(name).resolve()) if kind_of(name) == "folder" else name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "sizes": json.dumps(model.config.comet_config.to_dict()),
    }
    bits = bits_of(model._backbone)  # most have none, and are as they always were
    return made if bits is None else {**made, "quantization": bits}


def full_bytes(model: CometForCausalLM) -> int:
    """Bytes of what a session of this model holds once its memory is full, but its open chunk."""
    full = RowCounts(folds=1, entries=model.config.comet_config.temporary_slots)
    itemsize = {name: dtype.itemsize for dtype, name in _NAMES.items()}
    return sum(
        math.prod(shape) * itemsize[dtype]
        for name, (shape, dtype) in _wanted(model, full).items()
        if name != "open"
    )


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of what a file holds, in hexadecimal."""
    digest = hashlib.sha256()
    for key in (_KEY, _NOTES):
        text = metadata.get(key, "")
        digest.update(f"{key} {len(text)} ".encode())
        digest.update(text.encode())
    for name in sorted(tensors):
        digest.update(f"{name} ".encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _metadata(path: str | Path) -> dict[str, str]:
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a directory, not a session file")
    with path.open("rb") as file:
        return read_metadata(file, os.fstat(file.fileno()).st_size, path)


def _opened(path: str | Path) -> Any:
    """The file, whose header was looked at."""
    try:
        return safe_open(path, "pt", device="cpu")
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is no session file, or a truncated one: {error}") from error


def _counts(sizes: CometConfig, document: Mapping[str, Any]) -> RowCounts:
    """Where a row stands; in older files every chunk is a full one."""
    folds = document["folds"]
    entries = folds * sizes.compression_tokens(sizes.chunk_size)
    return RowCounts(
        folds=folds,
        entries=document.get("entries", min(entries, sizes.temporary_slots)),
        tokens=document.get("tokens", folds * sizes.chunk_size),
    )


def _wanted(model: CometForCausalLM, row: RowCounts) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor that a session of this model holds; -1 is any length."""
    sizes = model.config.comet_config
    wanted: dict[str, tuple[tuple[int, ...], str]] = {"open": ((-1,), "I64")}
    if row.folds == 0:
        return wanted
    grid = model.model.grid(sizes.row_length)
    item = torch.zeros(1, 1, model.config.hidden_size, dtype=model.dtype)
    for i, (cell, weights, rotary) in enumerate(
        zip(grid.cells, grid.weights, grid.rotary, strict=True)
    ):
        if weights.global_memory is not None:
            shape = (1, sizes.readout_tokens, model.config.hidden_size)
            wanted[f"state.{i}"] = (shape, _NAMES[weights.global_memory.norm.weight.dtype])
        if weights.temporary_memory is not None:
            wanted[f"entries.{i}"] = ((1, row.entries, cell.entry_width), _NAMES[model.dtype])
        own = cell.own_like(item.to(device_of(cell)), rotary)
        for name, like in own.items():
            wanted[f"own.{i}.{name}"] = (tuple(like.shape), _NAMES[like.dtype])
    return wanted


def _check_tensors(path: str | Path, file: Any, wanted: Mapping[str, Any]) -> None:
    """Refuse tensors that are missing, unknown, or of another shape or dtype."""
    found = set(file.keys())
    for name in sorted(found ^ set(wanted)):
        what = "lacks" if name in wanted else "holds an unknown"
        raise ValueError(f"{path} is damaged: it {what} tensor {name!r}")
    for name, (shape, dtype) in wanted.items():
        part = file.get_slice(name)
        given = tuple(part.get_shape())
        fits = len(given) == len(shape) and all(
            want in (have, -1) for have, want in zip(given, shape, strict=True)
        )
        if not fits or part.get_dtype() != dtype:
            raise ValueError(
                f"{path} is damaged: tensor {name!r} is {part.get_dtype()} {list(given)}, "
                f"expected {dtype} {list(shape)}"
            )


def _layer(file: Any, model: CometForCausalLM, i: int, wanted: Mapping[str, Any]) -> LayerState:
    device = device_of(model.model.cells[i])

    def tensor(name: str) -> Tensor | None:
        if name not in wanted:
            return None
        # In memory of its own: products round by how a tensor is aligned, in a file by its header.
        return file.get_tensor(name).clone().to(device)

    entries, of_own = tensor(f"entries.{i}"), f"own.{i}."
    memory = LayerMemory(tensor(f"state.{i}"), () if entries is None else (entries,))
    names = [name for name in wanted if name.startswith(of_own)]
    own = {name.removeprefix(of_own): x for name in names if (x := tensor(name)) is not None}
    return LayerState(memory, own=own)


def _check(path: object, document: Any) -> None:
    """Refuse a document that no save() wrote."""

    def number(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53

    if not isinstance(document, dict) or not number(document.get("format")):
        raise ValueError(f"{path} is damaged: its document has no format number")
    if document["format"] != FORMAT:
        raise ValueError(
            f"{path} has format {document['format']}, but this library (cometlm {__version__}) "
            f"reads format {FORMAT}; it was written by cometlm {document.get('version')}"
        )
    counts = ("folds", "turns", "characters")
    parts = {
        "made_by": ("backbone", "memory weights", "config"),
        "model": ("name", "dtype", "sizes"),
    }
    sound = all(number(document.get(name)) for name in counts)
    sound = sound and all(number(document.get(name, 0)) for name in ("entries", "tokens"))
    sound = sound and all(
        isinstance(document.get(name), dict)
        and all(isinstance(document[name].get(key), str) for key in keys)
        for name, keys in parts.items()
    )
    sound = sound and isinstance(document.get("text", ""), str)
    sound = sound and is_settings(document["made_by"].get(SETTINGS, "{}"))
    stream = document.get("stream")
    sound = (
        sound
        and "stream" in document
        and (
            stream is None
            or (
                isinstance(stream, dict)
                and isinstance(stream.get("text"), str)
                and _encodable(stream["text"])
                and number(stream.get("done"))
                and stream["done"] <= len(stream["text"])
                and isinstance(stream.get("started"), bool)
                and isinstance(stream.get("special", False), bool)
            )
        )
    )
    sound = sound and document["model"].get("quantization", "") in ("", *get_args(Bits))
    if not sound or not is_sizes(document["model"]["sizes"]):
        raise ValueError(f"{path} is damaged: its document is not what a session writes")
