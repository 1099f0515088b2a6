"""Cells through `torch.compile`, or as they were where that fails."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn


def compile_or_warn(cells: Iterable[nn.Module], trial: Callable[[], None], **options: Any) -> bool:
    """Put every cell through `torch.compile` and try them.

    Args:
        cells: of one model.
        trial: calls them; compilers fail at the first call and not before.
        options: of `torch.compile`.

    Returns:
        Whether the cells are compiled now; if not, a warning has said why.
    """
    cells = list(cells)
    for cell in cells:
        cell.compile(**options)
    try:
        trial()
    except RuntimeError as error:  # what dynamo and its backends raise
        for cell in cells:
            cell._compiled_call_impl = None
        reason = " ".join(str(error).split())[:300]
        warnings.warn(
            f"the cells stay uncompiled, since torch.compile failed: {reason}", stacklevel=3
        )
        return False
    return True
