"""Reading a training run's configuration: YAML and changes to it, as typed fields."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cometlm.fields import build, read_fields
from cometlm.train.config import TrainConfig

_PATHS = ("model", "output", "records", "evaluate")  # fields in which ~ is a home


def read_config(path: str | Path, changes: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file, with changes of the form "key=value" or "key.inner.0=value".

    Raises:
        ValueError: no YAML, an unknown field, a value of another type, an impossible one.
        OSError: the file cannot be read.
    """
    values = read_fields(path, changes)
    for name in _PATHS:
        if isinstance(values.get(name), str):
            values[name] = os.path.expanduser(values[name])
    return config_of(values)


def config_of(values: Mapping[str, Any]) -> TrainConfig:
    """A configuration from plain values; fields that are missing have their defaults.

    Raises:
        ValueError: as `read_config`.
    """
    return build(TrainConfig, values)
