"""Chat templates that mark what the assistant says, for a loss on that alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Each renders the same text as the template that the model comes with.
TEMPLATES = {
    "smollm2": Path(__file__).parent / "smollm2.jinja",
}


def generation_template(tokenizer: Any) -> str | None:
    """A template with `{% generation %}` marks that renders like the tokenizer's own.

    Returns:
        The tokenizer's, if it has marks; one of ours, if that renders the same; else None, and trl
        looks among its own.
    """
    own = tokenizer.chat_template
    if not isinstance(own, str) or "{% generation %}" in own:
        return own if isinstance(own, str) else None
    probe = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
    ]
    wanted = tokenizer.apply_chat_template(probe, tokenize=False)
    for path in TEMPLATES.values():
        template = path.read_text(encoding="utf-8")
        if tokenizer.apply_chat_template(probe, tokenize=False, chat_template=template) == wanted:
            return template
    return None
