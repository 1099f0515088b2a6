"""What the verbs share: consoles, options, and the progress bar of reading."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from tqdm.auto import tqdm
from transformers.utils import logging as hf_logging

from cometlm.checkpoints.source import Source
from cometlm.core.causal_lm import CometForCausalLM
from cometlm.device import as_dtype, available_memory, find_device, readable_bytes
from cometlm.extras import missing, pip_install
from cometlm.model_loader import QuantizationWarning, load
from cometlm.session.file import read_document
from cometlm.session.session import SessionStats

# Paths and what a model writes may look like rich's markup or its names of emoji.
out = Console(markup=False, emoji=False)
err = Console(markup=False, emoji=False, stderr=True)

UNTRAINED = (
    "The memory is untrained: it has been attached, not fine-tuned. The model reads everything, "
    "but what it writes next shows no recall beyond the open chunk."
)

NOTHING_WRITTEN = (
    "The answer is empty: the model ended it at once. A memory that was trained for one kind of "
    "question may do so with others."
)


def silence_libraries() -> None:
    """Let the libraries below log errors only: the hub's retries are warnings, for example."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    for name in ("transformers", "huggingface_hub", "bitsandbytes.backends"):
        logging.getLogger(name).setLevel(logging.ERROR)


def resolve_quietly(name: str) -> Source:
    """`Source.resolve` without the libraries' own chatter."""
    silence_libraries()
    return Source.resolve(name)


def load_quietly(
    name: str, device: str | None = None, dtype: str | None = None, **options: Any
) -> Any:
    """`load` with a word on what happens and without the libraries' own chatter.

    Args:
        options: further ones of `load`; None is its default.
    """
    find_device(device)  # before a word on loading, and before whatever takes long
    silence_libraries()
    chosen = {key: value for key, value in options.items() if value is not None}
    err.print(f"loading {name} …", highlight=False, soft_wrap=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, tokenizer = load(name, device=device, dtype=as_dtype(dtype), **chosen)
    for one in caught:
        if issubclass(one.category, QuantizationWarning):
            err.print(str(one.message), style="yellow", soft_wrap=True)
    return model, tokenizer


def load_for_session(
    path: Path, name: str | None, device: str | None, quantization: str | None = None
) -> Any:
    """The model that made a saved session, and its tokenizer.

    Args:
        name: load this model instead of the one that the session names.
        quantization: load it so, and not as the session says.
    """
    name = name or read_document(path)["model"]["name"]
    if not name:
        raise ValueError(f"{path} does not know its model's name; give it with --model")
    made = made_with(path)
    if quantization:
        made["quantization"] = quantization
    return load_quietly(name, device, **made)


def pack_weights(model: CometForCausalLM) -> None:
    """Have a model write faster (`CometForCausalLM.pack_weights`), where memory is plenty.

    The copies may take half of what is free, so that what is read and written has room beside them.
    """
    free = available_memory()
    model.pack_weights(most_bytes=None if free is None else free // 2)


def made_with(path: Path) -> dict[str, Any]:
    """How the model of a saved session was loaded: options of `load_quietly`."""
    made = read_document(path)["model"]
    options = {"dtype": made["dtype"], **json.loads(made["sizes"])}
    if made.get("quantization"):
        options["quantization"] = made["quantization"]
    return options


def print_stream(pieces: Iterable[str]) -> None:
    """Write text to standard output as it comes; an answer without any is said to be none."""
    wrote = False
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
        wrote = wrote or bool(piece.strip())
    sys.stdout.write("\n")
    sys.stdout.flush()
    if not wrote:
        err.print(NOTHING_WRITTEN, style="yellow", soft_wrap=True)


def print_beside_bars(line: str) -> None:
    """A line on standard error, above the trainer's progress bar if there is one."""
    with tqdm.external_write_mode(file=sys.stderr):
        err.print(line, highlight=False, soft_wrap=True)


def print_error(error: Exception) -> None:
    """An error as one line, however long."""
    said = " ".join(_message(error).split())
    err.print(f"error: {said}", style="red", highlight=False, soft_wrap=True)


def _message(error: Exception) -> str:
    """What an error says; of a module that is not there, the command that brings its package."""
    said = str(error)
    if not isinstance(error, ModuleNotFoundError) or not said.startswith("No module named"):
        return said
    module = (error.name or "").partition(".")[0]
    if not module or module in ("cometlm", *sys.stdlib_module_names) or not missing([module]):
        return said  # something that no package brings
    return f"this needs {module}, which is not installed; run: {pip_install([module])}"


def describe(model: CometForCausalLM) -> str:
    """One line: what was loaded, where, and its sizes."""
    sizes = model.config.comet_config
    dtype = str(model.dtype).removeprefix("torch.")
    overlap = f" ({sizes.overlap} twice)" if sizes.overlap else ""
    return (
        f"{model.config.backbone or 'model'} · {dtype} on {model.device} · chunk "
        f"{sizes.chunk_size}{overlap}, {sizes.global_slots} global + {sizes.temporary_slots} "
        "temporary slots"
    )


def is_untrained(model: CometForCausalLM) -> bool:
    """Whether the memory came with `attach` and not from a checkpoint."""
    return not model.config.name_or_path


def tell_what_it_learned(model: CometForCausalLM, console: Console = err) -> None:
    """One line: that the memory is untrained, or what it was trained for, where that is known."""
    if is_untrained(model):
        console.print(UNTRAINED, style="yellow")
    elif model.config.trained_for:
        what = f"The memory was trained for {model.config.trained_for}."
        console.print(what, highlight=False, soft_wrap=True)


class ReadingProgress:
    """A bar with tokens, tokens/s, chunks and bytes of memory held."""

    def __init__(self, total_bytes: int | None, tokens_before: int = 0) -> None:
        self._total = total_bytes
        self._before = tokens_before
        self._bar = Progress(
            SpinnerColumn("dots" if err.encoding.startswith("utf") else "line"),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=err,
            transient=True,
        )
        self._task = self._bar.add_task("reading", total=total_bytes)
        self._start = time.perf_counter()
        self._seen = 0

    def __enter__(self) -> ReadingProgress:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the bar away."""
        with contextlib.suppress(OSError):  # a terminal that was closed
            self._bar.stop()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    def counting(self, texts: Iterable[str]) -> Iterator[str]:
        """Pass text on, counting how much of the input is used."""
        for text in texts:
            yield text
            if self._total is not None:
                self._seen += len(text.encode())
                self._bar.update(self._task, completed=self._seen)

    def show(self, stats: SessionStats) -> None:
        """Show the state after a chunk."""
        self._bar.update(
            self._task,
            description=(
                f"{stats.tokens:,} tokens · {self._rate(stats):,.0f}/s · {stats.chunks:,} chunks · "
                f"{readable_bytes(stats.memory_bytes)} held"
            ),
        )

    def summary(self, stats: SessionStats) -> str:
        """The last state as a line."""
        tokens = stats.tokens - self._before
        return (
            f"{tokens:,} tokens in {self.seconds:,.1f} s ({self._rate(stats):,.0f}/s), "
            f"{stats.chunks:,} chunks folded, {readable_bytes(stats.memory_bytes)} of memory held"
        )

    def _rate(self, stats: SessionStats) -> float:
        return (stats.tokens - self._before) / self.seconds if self.seconds else 0.0
