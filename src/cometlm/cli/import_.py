"""`cometlm import DIR OUT`: a published checkpoint becomes one of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cometlm.checkpoints.published import convert_published
from cometlm.cli.console import describe, err
from cometlm.core.causal_lm import CometForCausalLM


def import_(
    directory: Annotated[
        Path, typer.Argument(help="The published folder: config.json and safetensors.")
    ],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
) -> None:
    """Turn a published CoMeT checkpoint into one that `cometlm` and transformers load."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already and not empty")
    model = convert_published(CometForCausalLM, directory, out)
    err.print(f"{describe(model)}\nsaved {out}", highlight=False, soft_wrap=True)
