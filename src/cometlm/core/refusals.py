"""What a call of a model may not say: it would be ignored, or would mean something else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cometlm.core.cache import CometCache
from cometlm.core.plan import ReadOptions
from cometlm.core.text_batch import text_alone


def refuse_past(past: CometCache | None) -> None:
    """Refuse packed documents behind a past.

    Raises:
        ValueError: there is one.
    """
    if past is not None:
        raise ValueError(
            "forward() does not take position_ids or cu_seq_lens_q with past_key_values: packed "
            "documents begin with an empty memory"
        )


def refuse_of_packed(options: Mapping[str, Any]) -> None:
    """Refuse what says how one text is cut, where there are several.

    Raises:
        ValueError: names it.
    """
    for name in ("chunk_lengths", "close_last"):
        if options.get(name):
            raise ValueError(
                f"forward() does not take {name} with packed documents: each is cut by itself"
            )


# What callers pass along that says nothing new: it describes packed documents to kernels that are
# not used here.
_SAID_ELSEWHERE = ("cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def refuse_unknown(options: Mapping[str, Any]) -> None:
    """Refuse what would be ignored.

    Raises:
        ValueError: names it.
    """
    for name, value in text_alone(options).items():
        known = name in _SAID_ELSEWHERE or name in ReadOptions.__annotations__
        if not known and value is not None and value is not False:
            shown = f"{name}={value!r}" if isinstance(value, (bool, int, float, str)) else name
            raise ValueError(f"forward() does not take {shown}")


# What a config may ask of every call, as it usually is.
_FLAGS = {"output_hidden_states": False, "output_attentions": False, "return_dict": True}


def refuse_flags(config: Any, learning: bool) -> None:
    """Refuse what a config asks for and would not get.

    Raises:
        ValueError: names it.
    """
    for name, usual in _FLAGS.items():
        value = getattr(config, name, usual)
        if value is not None and value != usual:
            raise ValueError(f"config.{name} must be {usual} with a memory, got {value!r}")
    if learning and getattr(config.backbone_config, "output_router_logits", False):
        raise ValueError(
            "backbone_config.output_router_logits must be False, got True: the loss has no part "
            "for the balance of experts"
        )
