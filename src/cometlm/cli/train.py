"""`cometlm train CONFIG.yaml`: teach a model to use its memory."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Annotated

import typer
from transformers.utils import logging as hf_logging

from cometlm.cli import options
from cometlm.cli.console import out, print_beside_bars
from cometlm.device import find_device
from cometlm.extras import TRAIN, lacks

_NEEDS = ("trl", "peft", "accelerate", "datasets")


def train(
    config: Annotated[Path, typer.Argument(help="A YAML file; see recipes/.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a field: key=value, key.inner.0=value."),
    ] = None,
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Begin anew; what the output holds moves to earlier-1."),
    ] = False,
    device: options.Device = None,
) -> None:
    """Fine-tune a model with memory; run it again to go on where it stopped."""
    from cometlm.train.config_file import read_config

    chosen = read_config(config, set_ or [])
    find_device(device)
    if message := lacks("training", _NEEDS, TRAIN):
        raise ValueError(message)
    from cometlm.train import run

    hf_logging.set_verbosity_warning()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are warnings
    speaks = int(os.environ.get("RANK", "0")) == 0  # one rank of a job is enough to read

    def log(line: str) -> None:
        if speaks:
            print_beside_bars(line)

    log(f"loading {chosen.model} …")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            run.train(chosen, device=device, restart=restart, log=log)
        except KeyboardInterrupt:
            again = "the same command without --restart" if restart else "the same command"
            log(f"\ninterrupted; {again} goes on from the last checkpoint, if there is one")
            raise typer.Exit(130) from None
    if speaks:
        out.print(
            f"saved {chosen.output}: cometlm chat {chosen.output}", highlight=False, soft_wrap=True
        )
