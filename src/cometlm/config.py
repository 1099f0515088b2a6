"""The sizes and switches of CoMeT, validated once and then frozen, and their Hugging Face config.

Legend used in this package: B batch, N text tokens, I items (text, compression and readout tokens
of one chunk), M readout tokens, K capacity, D width of the backbone, L layers.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

_POSITIVE = ("chunk_size", "readout_tokens", "stride", "capacity", "rank")
RUNTIME_SIZES = ("chunk_size", "stride", "capacity", "overlap")  # change no weight
_SWITCHES = ("global_memory", "temporary_memory", "gate")


@dataclass(frozen=True, kw_only=True)
class CometConfig:
    """Sizes of a CoMeT (SPEC §2, §5). The defaults are the paper's.

    Args:
        chunk_size: text tokens per chunk.
        readout_tokens: readout tokens per chunk, which is also the number of global memory slots.
        stride: one compression token follows every `stride` text tokens.
        capacity: temporary memory slots; the oldest entries leave first.
        overlap: text tokens at the end of a chunk that a session reads again at the beginning of
            the next, which costs that share of the time. What a border cuts then stands whole in
            one chunk, and a backbone that spends a chunk's first token as an attention sink spends
            one that was read before. `forward`, `generate` and training never read twice.
        rank: inner width of the low-rank adapters of the memory.
        global_memory: keep a global memory. Without it there are no readout tokens.
        temporary_memory: keep a temporary memory. Without it there are no compression tokens.
        gate: mix the old global state with the new; without it the new replaces the old
            (the paper's ablation).

    Raises:
        ValueError: a size below 1 or not an integer, or a switch that is not a bool.
    """

    chunk_size: int = 2048
    readout_tokens: int = 512
    stride: int = 8
    capacity: int = 2048
    overlap: int = 0
    rank: int = 8
    global_memory: bool = True
    temporary_memory: bool = True
    gate: bool = True

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}{_switch_hint(name)}")
        overlap = self.overlap
        if isinstance(overlap, bool) or not isinstance(overlap, int):
            raise ValueError(f"overlap must be an integer of at least 0, got {overlap!r}")
        if not 0 <= overlap < self.chunk_size:
            raise ValueError(
                f"overlap must be at least 0 and less than chunk_size={self.chunk_size}, got "
                f"{overlap}"
            )
        for name in _SWITCHES:
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be True or False, got {value!r}")

    @property
    def global_slots(self) -> int:
        """Rows of global memory that a chunk can see: M, or 0 without global memory."""
        return self.readout_tokens if self.global_memory else 0

    @property
    def temporary_slots(self) -> int:
        """Rows of temporary memory that a chunk can see at most: K, or 0 without one."""
        return self.capacity if self.temporary_memory else 0

    @property
    def memory_rows(self) -> int:
        """Rows of memory in front of a chunk once the memory is full."""
        return self.global_slots + self.temporary_slots

    @property
    def chunk_items(self) -> int:
        """Items of a whole chunk: its text, its compression tokens and its readout tokens."""
        return self.chunk_size + self.compression_tokens(self.chunk_size) + self.global_slots

    @property
    def row_length(self) -> int:
        """The longest row that ever enters a layer; no position reaches it (SPEC §2)."""
        return self.memory_rows + self.chunk_items

    def compression_tokens(self, text_tokens: int) -> int:
        """Compression tokens of a closed chunk with `text_tokens` text tokens (SPEC §2)."""
        return math.ceil(text_tokens / self.stride) if self.temporary_memory else 0

    def check_positions(self, limit: int | None, field: str = "max_position_embeddings") -> None:
        """Refuse sizes whose longest row does not fit the backbone's positions.

        Args:
            limit: how many it has; None for any number.
            field: of its config, which says so.

        Raises:
            ValueError: `row_length` exceeds `limit`; the message shows the sum.
        """
        if limit is not None and self.row_length > limit:
            largest = max(("chunk_size", "capacity", "readout_tokens"), key=self._slots_of)
            raise ValueError(
                f"{largest}={getattr(self, largest)} is too large for this backbone: global memory "
                f"{self.global_slots} + temporary memory {self.temporary_slots} + chunk "
                f"{self.chunk_size} + compression tokens {self.compression_tokens(self.chunk_size)}"
                f" + readout {self.global_slots} = {self.row_length} positions, but the backbone "
                f"has {field}={limit}"
            )

    def _slots_of(self, name: str) -> int:
        """How many rows of a chunk come of a field, which may be switched off."""
        switched = {"capacity": self.temporary_slots, "readout_tokens": 2 * self.global_slots}
        return switched.get(name, self.chunk_size)

    def replace(self, **changes: Any) -> CometConfig:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CometConfig:
        """Build from `to_dict`'s output.

        Raises:
            ValueError: a name that is not a field, or an impossible value.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(f"unknown CometConfig field {name!r}; it has {', '.join(known)}")
        return cls(**values)


# Tokens of a text that is never too long. A buffer of this length is refused by any allocator at
# once, where one of a billion tokens would be tried.
ENDLESS = 10**12
_OLDER_NAME = "text_config"  # of `CometModelConfig.backbone_config`

_PROPORTIONS = ("chunk_size", "readout_tokens", "capacity")  # halved together
_SMALLEST_CHUNK = 16


_POSITIONS = ("max_position_embeddings", "max_target_positions")  # the latter of Whisper's decoder


def position_limit(config: Any) -> int | None:
    """Positions that a backbone was made for, or None if its config does not say."""
    said = (getattr(config, name, None) for name in _POSITIONS)
    return next((int(limit) for limit in said if limit), None)


def position_field(config: Any) -> str:
    """The field in which a backbone's config says its `position_limit`."""
    name = next((name for name in _POSITIONS if getattr(config, name, None)), _POSITIONS[0])
    return str(config.attribute_map.get(name, name))


def depth(config: Any) -> int:
    """Layers of a backbone's decoder, 0 if its config does not say."""
    # Decoders out of encoder-decoders give out their encoder's as `num_hidden_layers`.
    own = getattr(config, "decoder_layers", None) or getattr(config, "num_hidden_layers", None)
    return int(own or 0)


def sizes_for(backbone: Any, sizes: Mapping[str, Any]) -> CometConfig:
    """The sizes of a new memory: those given, and else the paper's.

    Where no size is given and the paper's do not fit the backbone's positions, chunk, readout
    tokens and capacity are halved together until they do, and a warning says so.

    Args:
        backbone: its config.
        sizes: `CometConfig` fields.

    Raises:
        ValueError: a name that is no field, an impossible value.
    """
    config = CometConfig(**known_sizes(sizes))
    limit = position_limit(backbone)
    given = {*_PROPORTIONS, "stride"} & set(sizes)
    if given or limit is None or config.row_length <= limit:
        return config
    smaller = config
    while smaller.row_length > limit and smaller.chunk_size > _SMALLEST_CHUNK:
        halves = {name: max(1, getattr(smaller, name) // 2) for name in _PROPORTIONS}
        smaller = smaller.replace(**halves)
    if smaller.row_length > limit:
        return config  # which is refused with all its numbers
    taken = ", ".join(f"{name}={getattr(smaller, name)}" for name in (*_PROPORTIONS, "stride"))
    warnings.warn(
        f"the paper's sizes make rows of {config.row_length} positions, but the backbone has "
        f"{position_field(backbone)}={limit}: {taken} are taken (give sizes to choose others)",
        stacklevel=3,
    )
    return smaller


def _switch_hint(name: str) -> str:
    switch = {
        "readout_tokens": "global_memory",
        "stride": "temporary_memory",
        "capacity": "temporary_memory",
    }.get(name)
    return f" (to do without, set {switch}=False)" if switch else ""


def known_sizes(sizes: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same sizes, all of them fields of `CometConfig`.

    Raises:
        ValueError: a name that is none.
    """
    for name in sizes:
        if name not in CometConfig.__dataclass_fields__:
            fields = ", ".join(CometConfig.__dataclass_fields__)
            raise ValueError(f"unknown CometConfig field {name!r}; it has {fields}")
    return sizes


class CometModelConfig(PreTrainedConfig):
    """Configuration of a backbone with CoMeT attached.

    The backbone's own config is not called `text_config`, as those of the language models inside
    multimodal ones are: who looks for a text's longest length looks there, and finds the
    backbone's. Checkpoints that were saved under that name still load.

    Attributes:
        backbone_config: the backbone's own config; of a multimodal one, its language model's.
        backbone: name or path that the backbone was loaded from.
        comet: `CometConfig` as a dict; `comet_config` is the frozen object.
        suppressed_tokens: vocabulary ids that are never generated (the reserved rows of published
            checkpoints).
        trained_for: what the memory learned, as a part of a sentence; empty where nothing says it.
        use_cache: return a cache where a call does not say.
        logits_with_labels: give all logits where labels are given, too, while the model is not
            being trained: for a Trainer's `compute_metrics` and `predict`. They are as wide as the
            vocabulary for every token.
        max_position_embeddings: how long a text may be, for those who cut texts to what a config
            says. No text is too long, since positions restart at every chunk; nothing here asks it.
    """

    model_type = "cometlm"
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012 (transformers' own form)
    auto_map: ClassVar[dict[str, str]] = {}  # no code comes with a checkpoint; trl asks
    # What a Trainer that evaluates must not take for logits.
    keys_to_ignore_at_inference = ["past_key_values", "num_correct", "observed"]  # noqa: RUF012

    backbone_config: dict[str, Any] | PreTrainedConfig | None = None
    backbone: str = ""
    comet: dict[str, Any] | None = None
    suppressed_tokens: list[int] | None = None
    trained_for: str = ""
    use_cache: bool = True
    logits_with_labels: bool = False
    max_position_embeddings: int = ENDLESS

    def __post_init__(self, **kwargs: Any) -> None:
        older = kwargs.pop(_OLDER_NAME, None)
        if self.backbone_config is None:
            self.backbone_config = older
        if isinstance(self.backbone_config, dict):
            values = dict(self.backbone_config)
            self.backbone_config = AutoConfig.for_model(values.pop("model_type"), **values)
        text = self.backbone_config
        if text is not None:
            for name in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"):
                if kwargs.get(name) is None and getattr(text, name, None) is not None:
                    kwargs.pop(name, None)
                    setattr(self, name, getattr(text, name))
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    @classmethod
    def around(
        cls, backbone_config: PreTrainedConfig, comet: CometConfig, backbone: str
    ) -> CometModelConfig:
        """The config of a backbone, by name or path, with a memory of these sizes."""
        text: Any = backbone_config
        before = text._attn_implementation, text._experts_implementation
        made = cls(backbone_config=text, backbone=backbone, comet=comet.to_dict())
        # A config resets those of the configs inside it.
        text._attn_implementation, text._experts_implementation = before
        return made

    def get_text_config(
        self, decoder: bool | None = None, encoder: bool | None = None
    ) -> PreTrainedConfig:
        """The backbone's text config: whose token ids, heads and caps transformers and trl ask."""
        own = self.backbone_config
        return self if own is None else own.get_text_config(decoder, encoder)  # type: ignore

    @property
    def comet_config(self) -> CometConfig:
        """The frozen sizes and switches."""
        return CometConfig.from_dict(self.comet or {})

    @property
    def vocab_size(self) -> int:
        """Rows of the backbone's embedding."""
        return int(self.backbone_config.vocab_size)  # type: ignore[union-attr]

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.backbone_config.vocab_size = value  # type: ignore[union-attr]

    @property
    def hidden_size(self) -> int:
        """Width D of the backbone."""
        return int(self.backbone_config.hidden_size)  # type: ignore[union-attr]

    @property
    def num_hidden_layers(self) -> int:
        """Layers L of the backbone."""
        return depth(self.backbone_config)


AutoConfig.register(CometModelConfig.model_type, CometModelConfig)
