"""How large everything is: the shapes of the models, CoMeT's sizes, and the lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import Qwen3Config

from cometlm import CometConfig


@dataclass(frozen=True)
class Scale:
    """Every size of a run.

    Attributes:
        paper: these are the sizes that the promises are about.
        sizes: fields of `CometConfig`.
        shapes: fields of `Qwen3Config` for each shape, by its short name.
        trained: the shape that is trained.
        quick, slow: lengths that the quick and the long half read.
        million: the length that the flat law and full attention's are followed to.
        piece: chunks that one call reads.
        decoded: tokens read before decoding, `million` apart; the first is half a chunk.
        batches: rows that are decoded together.
        steps, windows: decoding steps of one window, and how many windows.
        steps_quick, steps_long: lengths of training steps.
        record: length of the longest training step.
        product: rows of the square matrices whose product is the peak.
        copied: bytes copied to measure the memory's bandwidth.
    """

    paper: bool
    sizes: dict[str, int]
    shapes: dict[str, dict[str, int]]
    trained: str
    quick: tuple[int, ...]
    slow: tuple[int, ...]
    million: int
    piece: int
    decoded: tuple[int, ...]
    batches: tuple[int, ...]
    steps: int
    windows: int
    steps_quick: tuple[int, ...]
    steps_long: tuple[int, ...]
    record: int
    product: int
    copied: int

    @property
    def comet(self) -> CometConfig:
        """CoMeT's sizes."""
        return CometConfig.from_dict(self.sizes)

    @property
    def filling(self) -> int:
        """Chunks after which the memory is full."""
        comet = self.comet
        return -(-comet.capacity // comet.compression_tokens(comet.chunk_size))

    def config(self, shape: str) -> Qwen3Config:
        """The backbone's config.

        Raises:
            ValueError: a shape that there is not.
        """
        if shape not in self.shapes:
            raise ValueError(f"shape must be one of {', '.join(self.shapes)}, got {shape!r}")
        fields: dict[str, Any] = dict(self.shapes[shape])
        return Qwen3Config(
            **fields, tie_word_embeddings=True, max_position_embeddings=262_144, use_cache=True
        )

    def cache_bytes(self, shape: str, tokens: int, width: int) -> int:
        """Bytes of the backbone's own KV cache, by counting; `width` bytes for each number."""
        fields = self.shapes[shape]
        heads = 2 * fields["num_key_value_heads"] * fields["head_dim"]
        return fields["num_hidden_layers"] * heads * width * tokens


def label(tokens: int) -> str:
    """A length for people: 8192 is 8k, 2**20 is 1M."""
    for size, unit in ((2**20, "M"), (1_000_000, "M"), (1024, "k")):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{unit}"
    return str(tokens)


FULL = Scale(
    paper=True,
    sizes={"chunk_size": 2048, "readout_tokens": 512, "stride": 8, "capacity": 2048},
    shapes={
        "4B": {
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151_936,
        },
        "0.6B": {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151_936,
        },
    },
    trained="0.6B",
    quick=(2**13, 2**15),
    slow=(2**16, 2**17),
    million=2**20,
    piece=8,
    decoded=(2**10, 2**15),
    batches=(1, 4, 16, 64),
    steps=32,
    windows=5,
    steps_quick=(2**15,),
    steps_long=(2**17, 2**20),
    record=10_000_000,
    product=8192,
    copied=2**30,
)

# The same work at sizes that a CPU does in seconds. As in the full sizes, one shape keeps entries
# as keys and values and the other as hidden rows.
TINY = Scale(
    paper=False,
    sizes={"chunk_size": 64, "readout_tokens": 8, "stride": 4, "capacity": 64},
    shapes={
        "4B": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "vocab_size": 512,
        },
        "0.6B": {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": 512,
        },
    },
    trained="0.6B",
    quick=(128, 256),
    slow=(512, 1024),
    million=4096,
    piece=8,
    decoded=(32, 512),
    batches=(1, 2),
    steps=8,
    windows=2,
    steps_quick=(512,),
    steps_long=(1024, 2048),
    record=4000,
    product=256,
    copied=2**20,
)
