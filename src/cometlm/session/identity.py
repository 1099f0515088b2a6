"""Which model made a memory: digests of weights, and what configs say of how they are used."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from cometlm.checkpoints.fingerprint import fingerprint
from cometlm.checkpoints.merge import weights_before_merging
from cometlm.config import CometConfig
from cometlm.core.causal_lm import CometForCausalLM
from cometlm.session.header import loads

SETTINGS = "settings"
_IS_SETTING = re.compile("rope|theta|eps|window|cap|scal|multiplier")  # in a field's name


def identity(model: CometForCausalLM) -> dict[str, str]:
    """Digests of everything that a memory depends on."""
    comet = "model.comet."
    weights = weights_before_merging(model)
    return {
        "backbone": fingerprint((n, w) for n, w in weights.items() if not n.startswith(comet)),
        "memory weights": fingerprint((n, w) for n, w in weights.items() if n.startswith(comet)),
        "config": json.dumps(model.config.comet_config.to_dict(), sort_keys=True),
        SETTINGS: json.dumps(_settings(model.config.backbone_config.to_dict()), sort_keys=True),
    }


def _settings(config: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    """What a backbone's config says of how its weights are used, such as its rotary positions."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{within}{key}"
        if isinstance(value, Mapping):
            found |= _settings(value, f"{name}.")
        elif value is not None and not name.startswith("_") and _IS_SETTING.search(name):
            found[name] = value
    return found


def difference(its: Mapping[str, str], ours: Mapping[str, str]) -> str | None:
    """How the model that made a file differs from this one, as words; None: it does not."""
    for part in ("backbone", "memory weights"):
        if its[part] != ours[part]:
            return f"its {part} is {its[part]}, this model's is {ours[part]}"
    return _other_size(its["config"], ours["config"]) or _other_setting(its, ours)


def _other_size(its: str, ours: str) -> str | None:
    """The first size of a memory that is another; an older file lacks what is newer."""
    if not is_sizes(its):
        return f"its config is {its}, this model's is {ours}"
    before, now = (CometConfig.from_dict(json.loads(one)).to_dict() for one in (its, ours))
    for name, value in before.items():
        if value != now[name]:
            return f"its {name} is {value}, this model's is {now[name]}"
    return None


def _other_setting(its: Mapping[str, str], ours: Mapping[str, str]) -> str | None:
    """The first setting of a backbone that is another."""
    # Older files have none, and versions of transformers do not all have the same.
    before, now = (json.loads(one.get(SETTINGS, "{}")) for one in (its, ours))
    for name in sorted(before.keys() & now.keys()):
        if not _same_setting(before[name], now[name]):
            return f"its backbone's {name} is {before[name]}, this model's is {now[name]}"
    return None


def _same_setting(its: Any, ours: Any) -> bool:
    """Whether two settings are one; a file of GGUF has rounded its numbers to float32."""
    if isinstance(its, (int, float)) and isinstance(ours, (int, float)):
        return math.isclose(its, ours, rel_tol=1e-5)
    return bool(its == ours)


def is_settings(text: object) -> bool:
    """Whether this is what `identity` says of a backbone's settings."""
    try:
        return isinstance(text, str) and isinstance(loads(text), dict)
    except ValueError:
        return False


def is_sizes(text: str) -> bool:
    """Whether this is what `identity` says of a memory's sizes."""
    try:
        values = loads(text)
        CometConfig.from_dict(values)
    except (ValueError, TypeError, AttributeError):
        return False
    return isinstance(values, dict)
