"""Whether a run's samples have a length that it can take: not too long, too short or all cut."""

from __future__ import annotations

from typing import Any

from cometlm.core.causal_lm import CometForCausalLM
from cometlm.train.config import Log, TrainConfig


def _lengths(dataset: Any) -> list[int]:
    """Tokens of each sample, also where several were packed into a row."""
    if "seq_lengths" in dataset.column_names:
        return [length for row in dataset["seq_lengths"] for length in row]
    return [len(ids) for ids in dataset["input_ids"]]


def check_lengths(
    dataset: Any,
    config: TrainConfig,
    model: CometForCausalLM | None = None,
    log: Log = print,
) -> None:
    """Refuse what would be cut unasked, and warn where there is nothing to remember.

    Args:
        model: what is trained on it; None if nothing is.

    Raises:
        ValueError: no samples, or samples longer than `max_length`.
    """
    lengths = _lengths(dataset)
    source = config.evaluate if model is None else config.records
    if not lengths:
        raise ValueError(f"{source} has no sample with a token to learn from")
    limit = config.max_length
    if limit is not None and not config.cut:
        longer = sum(length > limit for length in lengths)
        if longer:
            raise ValueError(
                f"{longer} of {len(lengths)} samples of {source} are longer than "
                f"max_length={limit} (the longest has {max(lengths):,} tokens); set cut: true to "
                "cut their ends off"
            )
    if model is not None:
        warn_of_single_chunks(max(lengths), config, model, log)


def warn_of_single_chunks(
    longest: int, config: TrainConfig, model: CometForCausalLM, log: Log
) -> None:
    """Warn where there is nothing to remember, for samples of at most `longest` tokens."""
    size = min((model.config.comet_config.chunk_size, *config.chunks.sizes))
    if longest <= size:
        log(
            f"warning: no sample is longer than one chunk ({size} tokens; the longest has "
            f"{longest}), so the memory is never read and learns nothing"
        )


def tell_cuts(dataset: Any, config: TrainConfig, records: int, log: Log) -> None:
    """Log how many samples lost their ends, and how many all that was to be learned."""
    cut = sum(length == config.max_length for length in _lengths(dataset))
    if cut or len(dataset) < records:
        log(
            f"{cut} of {records} samples end at max_length={config.max_length}, and "
            f"{records - len(dataset)} had nothing to learn before it and are left out"
        )


def check_enough_chunks(dataset: Any, config: TrainConfig, chunk_size: int) -> None:
    """Refuse samples that not every rank has a chunk of, where all are needed.

    Raises:
        ValueError: says how many.
    """
    ranks = config.chunk_parallel
    short = sum(-(-len(ids) // chunk_size) < ranks for ids in dataset["input_ids"])
    if config.shard_weights and short:
        raise ValueError(
            f"{short} of {len(dataset)} samples have fewer chunks of {chunk_size} tokens than "
            f"chunk_parallel={ranks}; with shard_weights every rank needs one"
        )
