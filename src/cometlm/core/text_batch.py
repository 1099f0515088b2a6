"""The text of one call: token ids in a padded batch, and how results go back to where ids stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cometlm.core.layout import ChunkLayout, Step
from cometlm.device import sent

_IDS = (torch.int64, torch.int32)  # what an embedding takes
_BY_VALUE = "ids are checked by value, and their number decides which chunks are closed"


@dataclass(frozen=True)
class TextBatch:
    """The text of one call: ids [B, N], and where each row's tokens begin and how many they are."""

    ids: Tensor
    starts: tuple[int, ...]
    lengths: tuple[int, ...]

    @classmethod
    @torch.compiler.disable(reason=f"{_BY_VALUE}; compile without fullgraph, or compile_cells()")
    def of(
        cls, ids: Tensor, mask: Tensor | None, vocabulary: int, device: torch.device
    ) -> TextBatch:
        """Check ids [B, N] and mask [B, N or more] and find where each row's tokens stand.

        Ids on the CPU are checked there and then sent, which waits for no device.

        Args:
            vocabulary: ids lie below it.
            device: where the text is wanted.

        Raises:
            ValueError: no tokens, ids outside 0 … vocabulary − 1, a mask with holes or of more
                than zeros and ones; a model that is being exported.
        """
        if torch.compiler.is_exporting():
            raise ValueError(f"a model with memory cannot be exported: {_BY_VALUE}")
        check_shape(ids)
        batch, width = ids.shape
        starts, lengths = (0,) * batch, (width,) * batch
        if mask is not None:
            if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < width:
                raise ValueError(
                    f"attention_mask must be [{batch}, {width}] like input_ids (or longer, with "
                    f"the past in front), got shape {tuple(mask.shape)}"
                )
            mask = mask[:, -width:]
            starts, lengths = _runs(mask)
            mask = mask.bool()
            ids = ids.masked_fill(~mask.to(ids.device), 0)
        low, high = torch.stack(torch.aminmax(ids)).tolist()  # one wait for the device
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"input_ids must lie in 0 … {vocabulary - 1} (the vocabulary), got "
                f"{low if low < 0 else high}"
            )
        return cls(sent(ids, device) if ids.device.type == "cpu" else ids, starts, lengths)

    @property
    def batch(self) -> int:
        """Rows."""
        return self.ids.shape[0]

    @property
    def width(self) -> int:
        """Columns, padding among them."""
        return self.ids.shape[1]

    @property
    def whole(self) -> bool:
        """Whether no row has padding."""
        return all(length == self.width for length in self.lengths)

    def reaches(self, step: Step, first: int) -> bool:
        """Whether a step has text in the columns from `first` on."""
        return any(
            piece.text > 0 and start + piece.start + piece.text > first
            for start, piece in zip(self.starts, step, strict=True)
        )

    def piece(self, layout: ChunkLayout) -> Tensor:
        """Ids [B, widest] of one step; filling where a row adds less than the widest."""
        return self._of_step(self.ids, layout)

    def labels(self, labels: Tensor, layout: ChunkLayout) -> Tensor:
        """Labels [B, widest] of one step, out of labels [B, N]; -100 at filling."""
        own = self._of_step(labels, layout)
        texts = [piece.text for piece in layout.step]
        if min(texts) == own.shape[1]:
            return own
        filling = torch.arange(own.shape[1])[None, :] >= torch.tensor(texts)[:, None]
        return own.masked_fill(sent(filling, own.device), -100)

    def _of_step(self, values: Tensor, layout: ChunkLayout) -> Tensor:
        """Columns of values [B, N] that belong to one step."""
        width = layout.widest_text
        firsts = [s + piece.start for s, piece in zip(self.starts, layout.step, strict=True)]
        if len(set(firsts)) == 1:
            first = min(firsts[0], self.width - width)
            if first == firsts[0]:
                return values[:, first : first + width]
        index = torch.tensor(firsts)[:, None] + torch.arange(width)
        return values.gather(1, sent(index.clamp(max=self.width - 1), values.device))

    def rows(self) -> list[list[int]]:
        """Each row's ids, without padding."""
        spans = zip(self.ids.tolist(), self.starts, self.lengths, strict=True)
        return [row[start : start + length] for row, start, length in spans]

    def aligned(self, outputs: list[tuple[Step, Tensor]], first: int = 0) -> Tensor:
        """Hidden states put where their ids stand, [B, N − first, D]; zeros at padding.

        Args:
            outputs: the steps that reach the columns from `first` on, and their hidden states.
        """
        if self.whole and all(len({piece.text for piece in step}) == 1 for step, _ in outputs):
            return torch.cat([out for _, out in outputs], dim=1)[:, first - self.width :]
        values: list[Tensor] = []
        rows: list[int] = []
        columns: list[int] = []
        for step, out in outputs:
            for b, piece in enumerate(step):
                begin = self.starts[b] + piece.start
                skip = min(max(0, first - begin), piece.text)
                values.append(out[b, skip : piece.text])
                rows.extend([b] * (piece.text - skip))
                columns.extend(range(begin + skip - first, begin + piece.text - first))
        flat = torch.cat(values)
        where = tuple(sent(torch.tensor(x), flat.device) for x in (rows, columns))
        empty = flat.new_zeros(self.batch, self.width - first, flat.shape[-1])
        return empty.index_put(where, flat)


def _runs(mask: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Start and length of the one run of ones in each row of mask [B, N]."""
    rows, is_known = torch.stack([mask.bool(), mask == mask.bool()]).cpu()  # waits once
    for b, i in (~is_known).nonzero().tolist():
        raise ValueError(
            f"attention_mask must be of ones and zeros, got {mask[b, i].item()} in row {b}: packed "
            "documents are told apart by position_ids, and there is no additive mask"
        )
    lengths = rows.sum(1)
    starts = rows.int().argmax(1)
    if not lengths.any():
        raise ValueError("attention_mask has no ones: there is no text to read")
    column = torch.arange(rows.shape[1])
    run = (column >= starts[:, None]) & (column < (starts + lengths)[:, None])
    for b in (run != rows).any(1).nonzero().flatten().tolist():
        raise ValueError(
            f"attention_mask has a hole in row {b}: ones must be contiguous, with padding on the "
            "left or on the right (generate() takes pad tokens for holes unless it is given a mask)"
        )
    return tuple(starts.tolist()), tuple(lengths.tolist())


def check_shape(ids: Tensor | None) -> Tensor:
    """Ids that are [B, N].

    Raises:
        ValueError: none, something else than whole numbers, another shape, or nothing in it.
    """
    if ids is None:
        raise ValueError(
            "input_ids must be given: each chunk's ids are embedded when its turn comes, so "
            "inputs_embeds are not taken, nor prompt tuning, which makes them"
        )
    if not isinstance(ids, Tensor):
        raise ValueError(f"input_ids must be a tensor [batch, tokens], got {type(ids).__name__}")
    if ids.dtype not in _IDS:
        raise ValueError(f"input_ids must be int64 or int32, got {ids.dtype}")
    if ids.dim() != 2 or ids.shape[0] == 0 or ids.shape[1] == 0:
        raise ValueError(
            f"input_ids must be [batch, tokens] with at least one of each, got shape "
            f"{tuple(ids.shape)}"
        )
    return ids


# Of what kind each token is, as processors of multimodal models say it: 0 is text.
_KINDS = ("token_type_ids", "mm_token_type_ids")
_OF_OTHER_INPUTS = ("pixel_", "image_", "video_", "input_features")


def text_alone(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a call without those that say of each token that it is text.

    Raises:
        ValueError: images or sound.
    """
    for name, value in options.items():
        if name.startswith(_OF_OTHER_INPUTS) and value is not None:
            raise ValueError(
                f"{name} cannot be read: with a memory a model reads text alone; detach() gives "
                "back the one that reads more"
            )
    return {
        name: value
        for name, value in options.items()
        if not (name in _KINDS and isinstance(value, Tensor) and not value.any())
    }


def check_labels(labels: Tensor, vocabulary: int) -> None:
    """Refuse labels that are no ids; they are on the CPU.

    Raises:
        ValueError: one that is neither -100 nor in 0 … vocabulary − 1.
    """
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be whole numbers, got {labels.dtype}")
    outside = (labels != -100) & ((labels < 0) | (labels >= vocabulary))
    if outside.any():
        raise ValueError(
            f"labels must lie in 0 … {vocabulary - 1} (the vocabulary) or be -100, got "
            f"{labels[outside][0].item()}"
        )


def documents(position_ids: Tensor | None, borders: Tensor | None, ids: Tensor) -> list[slice]:
    """The documents packed into a row: where `position_ids` start again at 0.

    Args:
        position_ids: [B, N]; only a single row may hold several documents.
        borders: where each begins and the last ends, [documents + 1] (`cu_seq_lens_q`), instead.
        ids: [B, N].

    Raises:
        ValueError: positions that do not count up from 0 in every document; several rows.
    """
    width = ids.shape[1]
    ends = [0, width]
    if position_ids is not None and len(position_ids) == 1:
        ends = [*(position_ids[0] == 0).nonzero().flatten().tolist(), width]
    elif borders is not None:
        ends = borders.tolist()
    if len(ends) < 2 or ends[0] != 0 or ends[-1] != width or (len(ends) > 2 and len(ids) > 1):
        raise ValueError(
            f"documents must fill one row of {width} tokens, got {len(ids)} rows and borders {ends}"
        )
    found = [slice(a, b) for a, b in pairwise(ends) if b > a]
    if position_ids is not None:
        counted = torch.cat([torch.arange(part.stop - part.start) for part in found])
        if not bool((position_ids.cpu() == counted).all()):
            raise ValueError(
                "position_ids must count up from 0 in every document: positions are places in "
                "the chunk here, so no others have a meaning"
            )
    return found


def next_labels(labels: Tensor, mask: Tensor | None) -> Tensor:
    """Labels [B, N] moved so that each position holds its next text token's, or -100."""
    if mask is not None:
        width = labels.shape[1]
        real = mask[:, -width:].bool().to(labels.device)
        follows = real.clone()
        follows[:, 1:] &= real[:, :-1]
        labels = labels.masked_fill(~follows, -100)
    return F.pad(labels[:, 1:], (0, 1), value=-100)
