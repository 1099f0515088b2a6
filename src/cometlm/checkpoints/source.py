"""A name, resolved once: the model that a built-in name, a folder or a hub id stands for.

`Source.resolve` reads configs and no weights. (It converts a built-in model, where that was not
done before.) Whatever takes a name resolves it once and passes the `Source` on.
"""

from __future__ import annotations

import copy
import difflib
import functools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

from cometlm.checkpoints.backbones import BUILT_IN, MEMORIES, converted, read_backbone
from cometlm.config import RUNTIME_SIZES, CometConfig, CometModelConfig, known_sizes, sizes_for

Kind = Literal["built-in", "folder", "hub"]

BACKBONE = "backbone"  # the folder of a backbone that is saved with its memory
CARRIED = f"./{BACKBONE}"  # what a checkpoint with such a folder names as its backbone


@dataclass(frozen=True, eq=False)
class Source:
    """Where a model comes from, and what it is. Made by `resolve`.

    The configs belong to the source: do not change them.

    Attributes:
        name: as the user gave it.
        kind: "built-in", "folder" or "hub".
        location: the folder or hub id that transformers reads; of a built-in model its converted
            copy.
        config: the config at `location`: a backbone's or a checkpoint's.
        memory: the config of the trained memory that comes with the name; None for a backbone.
        memory_location: the folder or hub id of that memory, or None.
    """

    name: str
    kind: Kind
    location: str
    config: PreTrainedConfig = field(repr=False)
    memory: CometModelConfig | None = field(default=None, repr=False)
    memory_location: str | None = None

    @classmethod
    def resolve(cls, name: str | os.PathLike[str] | Source) -> Source:
        """Find the model of that name. A `Source` is returned as it is.

        Args:
            name: a built-in name, a folder or a hub id, of a backbone or of a checkpoint. Built-in
                names win over folders, and folders over hub ids.

        Raises:
            ValueError: a built-in model that is not installed or not the one expected; a config
                that transformers does not know.
            OSError: nothing can be read under that name; a built-in model's converted copy cannot
                be kept.
        """
        if isinstance(name, Source):
            return name
        name = os.fspath(name)
        if name in MEMORIES:
            return replace(cls.resolve(MEMORIES[name]), name=name)
        kind = kind_of(name)
        location = str(converted(name, BUILT_IN[name])) if kind == "built-in" else name
        _check_can_be_found(name, kind)
        try:
            config = AutoConfig.from_pretrained(location)
        except OSError as error:
            raise _not_found(name, kind, location, error) from error
        if isinstance(config, CometModelConfig):
            return cls(name, kind, location, config, config, location)
        trained = BUILT_IN[name].trained if kind == "built-in" else None
        if trained is None:
            return cls(name, kind, location, config)
        memory = CometModelConfig.from_pretrained(str(trained))
        return cls(name, kind, location, config, memory, str(trained))

    @property
    def is_checkpoint(self) -> bool:
        """Whether the name is that of a checkpoint, which is a memory and names its backbone."""
        return isinstance(self.config, CometModelConfig)

    @property
    def has_memory(self) -> bool:
        """Whether a trained memory comes with the name: a checkpoint's, or a built-in model's."""
        return self.memory is not None

    @property
    def backbone_config(self) -> PreTrainedConfig:
        """The text config of the backbone."""
        return self.config.get_text_config()

    def memory_config(self, **sizes: Any) -> CometModelConfig | None:
        """The config of the trained memory, read with other sizes.

        Args:
            sizes: `CometConfig` fields, and `seed`. With another `chunk_size` and no `overlap`, the
                memory's own overlap is at most a quarter of it.

        Returns:
            A copy; or None where the memory is to be a new one: for a backbone, and for a built-in
            model where the sizes change the memory's weights or there is a seed.

        Raises:
            ValueError: a name that is no field, an impossible value, sizes that a checkpoint cannot
                have.
        """
        if self.memory is None:
            return None
        config = _resized(self.memory, sizes)
        if config is None and self.is_checkpoint:
            free = ", ".join(RUNTIME_SIZES)
            raise ValueError(
                f"{self.name} is a checkpoint: only {free} may be others, and gate false, got "
                f"{sizes}"
            )
        return config

    def comet_config(self, **sizes: Any) -> CometConfig:
        """The sizes of the memory that `load` gives.

        Args:
            sizes: as for `memory_config`; default the trained memory's, the built-in model's own,
                or the paper's.

        Raises:
            ValueError: as `memory_config`.
        """
        memory = self.memory_config(**sizes)
        if memory is not None:
            return memory.comet_config
        own = BUILT_IN[self.name].sizes if self.kind == "built-in" else {}
        changes = {name: value for name, value in sizes.items() if name != "seed"}
        return sizes_for(self.backbone_config, {**own, **changes})

    @functools.cached_property
    def backbone(self) -> Source:
        """The source of the backbone: this one, or what a checkpoint names.

        Raises:
            ValueError: the checkpoint names none, carries its backbone itself, or names another
                checkpoint.
            OSError: what it names cannot be read.
        """
        return self if not self.is_checkpoint else resolve_backbone(self.name, self._named_backbone)

    def load_backbone(
        self,
        *,
        dtype: Any = "auto",
        device_map: Any = None,
        quantization_config: QuantizationConfigMixin | None = None,
        **reading: Any,
    ) -> PreTrainedModel:
        """Load the backbone, without memory.

        Args:
            dtype: of its weights; "auto" is the one that they are saved in.
            device_map: as transformers takes it.
            quantization_config: quantise it so; one that is quantised already stays as it is.
            reading: other options of transformers' `from_pretrained`.

        Raises:
            ValueError: what it takes to quantise is missing; as `backbone`.
            OSError: it cannot be read.
        """
        where = {"dtype": dtype, "device_map": device_map, **reading}
        if self._named_backbone == CARRIED:
            return read_backbone(self.location, quantization_config, subfolder=BACKBONE, **where)
        if self.is_checkpoint:
            return self.backbone.load_backbone(quantization_config=quantization_config, **where)
        try:
            backbone = read_backbone(self.location, quantization_config, **where)
        except (OSError, SafetensorError) as error:
            raise _unreadable(self.name, self.kind, self.location, error) from error
        if self.kind == "built-in":
            backbone.config.name_or_path = self.name
        return backbone

    def load_tokenizer(self) -> Any:
        """Load the tokenizer: a checkpoint's own, or its backbone's.

        Raises:
            ValueError, OSError: there is none, or it cannot be read.
        """
        try:
            return AutoTokenizer.from_pretrained(self.location)
        except (OSError, ValueError):
            if not self._named_backbone:
                raise
            if self._named_backbone == CARRIED:
                raise OSError(
                    f"{self.name} holds no tokenizer; put one there: "
                    f"tokenizer.save_pretrained({self.name!r})"
                ) from None
            return self.backbone.load_tokenizer()

    @property
    def _named_backbone(self) -> str:
        """What a checkpoint calls its backbone; nothing for a backbone."""
        return self.config.backbone if isinstance(self.config, CometModelConfig) else ""


def kind_of(name: str) -> Kind:
    """What a name is taken for; a hub id if it is neither of the others. Asks only the disk."""
    if name in BUILT_IN:
        return "built-in"
    return "folder" if os.path.isdir(name) else "hub"


def resolve_backbone(checkpoint: str, named: str) -> Source:
    """The source of a backbone that a checkpoint names.

    Args:
        checkpoint: the checkpoint's name, for messages.
        named: the backbone's.

    Raises:
        ValueError: it names none, one in its own folder, or another checkpoint.
        OSError: what it names cannot be read.
    """
    if not named:
        raise ValueError(
            f"{checkpoint} names no backbone (it was saved from one without a name); give backbone="
        )
    if named == CARRIED:
        raise ValueError(f"{checkpoint} carries its backbone, which has no name of its own")
    try:
        source = Source.resolve(named)
    except OSError as error:
        raise OSError(f"the backbone that {checkpoint} names is missing: {error}") from error
    if source.is_checkpoint:
        raise ValueError(
            f"backbone must be a model without memory, got {named!r}, which is a checkpoint"
        )
    return source


def _resized(config: CometModelConfig, sizes: Mapping[str, Any]) -> CometModelConfig | None:
    """A trained memory's config with other sizes; None if its weights cannot have them."""
    if "seed" in sizes:
        return None
    own = config.comet_config
    wanted = own.replace(**{"overlap": 0, **known_sizes(sizes)})
    if "overlap" not in sizes:
        is_same = wanted.chunk_size == own.chunk_size
        # Its own may be most of a shorter chunk, or more than all of it.
        most = own.overlap if is_same else wanted.chunk_size // 4
        wanted = wanted.replace(overlap=min(own.overlap, most))
    free = {name: getattr(own, name) for name in RUNTIME_SIZES}
    if not wanted.gate:
        free["gate"] = own.gate  # the weights of one are left out
    if wanted.replace(**free) != own:
        return None
    resized = copy.deepcopy(config)
    resized.comet = wanted.to_dict()
    return resized


def _check_can_be_found(name: str, kind: Kind) -> None:
    """Refuse what is no model before anybody asks the hub for it.

    Raises:
        OSError: a file, a folder without a config, or a name that no folder has and no hub id can.
    """
    if kind == "folder" and not os.path.isfile(os.path.join(name, "config.json")):
        raise OSError(f"the folder {name!r} holds no config.json, so it is no model")
    if kind != "hub":
        return
    if os.path.isfile(name):
        raise OSError(f"{name!r} is a file; {_WHAT_A_MODEL_IS}")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        why = "no folder here, and cannot be a hub id"
        raise OSError(f"{_is_not_built_in(name)}, {why}") from error


_WHAT_A_MODEL_IS = "a model is a built-in name, a folder or a hub id"


def _not_found(name: str, kind: Kind, location: str, error: OSError) -> OSError:
    """What to say where there is no config under a name."""
    if kind != "hub":
        return _unreadable(name, kind, location, error)
    for cause in _causes(error):
        if isinstance(cause, GatedRepoError):
            return OSError(
                f"the Hugging Face hub gives {name!r} only to those who accepted its terms: see "
                f"https://huggingface.co/{name}, then log in with `hf auth login`"
            )
        if isinstance(cause, RepositoryNotFoundError):
            why = "and the Hugging Face hub has none of that name (private: `hf auth login`)"
            break
        if isinstance(cause, LocalEntryNotFoundError | OfflineModeIsEnabled):
            why = "and the Hugging Face hub cannot be reached (its cache does not hold it either)"
            break
    else:
        why = f"and the Hugging Face hub does not give it: {error}"
    return OSError(f"{_is_not_built_in(name)}, no folder here, {why}")


def _unreadable(name: str, kind: Kind, location: str, error: Exception) -> OSError:
    """What to say where files are damaged or missing."""
    if kind == "built-in":
        return OSError(
            f"the converted weights of {name} cannot be read: {error}; remove {location}, and they "
            "are converted again"
        )
    return OSError(f"the model {name!r} cannot be read: {error}")


def _is_not_built_in(name: str) -> str:
    known = [*BUILT_IN, *MEMORIES]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"{name!r} is no built-in model ({', '.join(known)}{hint})"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
