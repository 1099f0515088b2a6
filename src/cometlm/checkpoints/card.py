"""The README that a checkpoint is saved with: what it is, and how to use it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cometlm.checkpoints.adapters import has_adapter
from cometlm.checkpoints.weights import memory_parameters

if TYPE_CHECKING:
    from cometlm.core.causal_lm import CometForCausalLM


def model_card(model: CometForCausalLM, *, with_backbone: bool = False) -> str:
    """A README that says what the checkpoint is and how to use it."""
    sizes = model.config.comet_config
    backbone = model.config.backbone or "(not named)"
    added = sum(parameter.numel() for parameter in memory_parameters(model).values())
    hub_id = "/" in backbone and not backbone.startswith((".", "/"))
    head = ["---", "library_name: cometlm", "pipeline_tag: text-generation"]
    head += [f"base_model: {backbone}"] if hub_id else []
    head += ["tags:", "- cometlm", "- long-context", "- memory", "---"]
    holds = f"{added:,} memory weights" + (", a LoRA adapter" if has_adapter(model) else "")
    holds += " and its backbone" if with_backbone else ", and no backbone: that is loaded by name"
    table = "\n".join(f"| `{field}` | {value} |" for field, value in sizes.to_dict().items())
    return (
        "\n".join(head)
        + f"""

# A CoMeT memory for {backbone}

This checkpoint holds {holds}.
With it, the model reads text of any length in constant memory: {sizes.global_slots:,} slots of
global and {sizes.temporary_slots:,} of temporary memory per layer, whatever was read.

```python
import cometlm

model = cometlm.CometForCausalLM.from_pretrained("this checkpoint")
```

| size | value |
|---|---|
{table}

## Training

Say here which data, lengths and recipe the memory was trained with. A memory fresh from
`cometlm.attach` is untrained: it reads everything and recalls nothing beyond the open chunk.

Method: CoMeT, the Collaborative Memory Transformer, [arXiv 2602.01766](https://arxiv.org/abs/2602.01766).
"""
    )
