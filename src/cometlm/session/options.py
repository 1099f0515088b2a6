"""Options of an answer: those of `generate`, and variables of a chat template given among them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import GenerationConfig

from cometlm.core.causal_lm import CometForCausalLM

_NEW_TOKENS = 256  # written where the caller sets no length
# What counts the open chunk, of which only the session knows how long it is.
_BY_WHOLE_LENGTH = {"max_length": "max_new_tokens", "min_length": "min_new_tokens"}
_ONE_ANSWER = {"num_return_sequences": 1, "return_dict_in_generate": False}
# What a session gives `generate` itself.
_OWN = ("attention_mask", "cache", "input_ids", "inputs", "inputs_embeds", "past_key_values")
_ALWAYS = ("enable_thinking",)  # of the chat template, also of one that knows no thinking
_OF_THE_SESSION = ("messages", "tools", "add_generation_prompt")


def generation_options(
    given: Mapping[str, Any], model: CometForCausalLM, tokenizer: Any
) -> dict[str, Any]:
    """Options for `generate`: one answer, of bounded length.

    Raises:
        ValueError: several answers, a length that counts what was read, what the session gives
            itself, a stop string of no characters.
    """
    config = given.get("generation_config")
    if config is not None and not isinstance(config, GenerationConfig):
        raise ValueError(
            f"generation_config must be a GenerationConfig, got {type(config).__name__}"
        )
    for name in _OWN:
        if name in given:
            raise ValueError(f"{name} is the session's to give: it holds what was read")
    for name, only in _ONE_ANSWER.items():
        for source in (given.get(name), getattr(config, name, None)):
            if source is not None and source != only:
                raise ValueError(f"{name}={source!r}: a session writes one answer, as text")
    for name, instead in _BY_WHOLE_LENGTH.items():
        own = given.get(name)
        configured = getattr(config, name, None)
        usual = getattr(GenerationConfig(), name, None)
        length = own if own is not None else configured if configured != usual else None
        if length is not None and (own is not None or getattr(config, instead, None) is None):
            raise ValueError(
                f"{name}={length!r} counts tokens that were read, of which a session holds only "
                f"the last: say {instead}"
            )
    options = dict(given)
    stops = options.pop("stop_strings", None)
    if stops:
        options["stop_strings"] = stops = [stops] if isinstance(stops, str) else list(stops)
    if stops == "" or "" in (stops or ()):
        raise ValueError("stop_strings must hold text, got an empty string, which stands anywhere")
    if "max_new_tokens" not in options and getattr(config, "max_new_tokens", None) is None:
        options["max_new_tokens"] = _NEW_TOKENS
    if model.generation_config.pad_token_id is None and "pad_token_id" not in options:
        known = None if tokenizer is None else tokenizer.pad_token_id
        options["pad_token_id"] = known if known is not None else 0
    of_config = getattr(config or model.generation_config, "stop_strings", None)
    if tokenizer is not None and (stops or of_config):
        options.setdefault("tokenizer", tokenizer)
    return options


def stop_ids(given: Mapping[str, Any], model: CometForCausalLM) -> set[int]:
    """Ids that end generation under these options."""
    config = given.get("generation_config") or model.generation_config
    stops = given.get("eos_token_id", config.eos_token_id)
    if stops is None:
        return set()
    return {stops} if isinstance(stops, int) else {int(stop) for stop in stops}


def template_variables(
    tokenizer: Any, given: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keywords that a chat template names and `generate` does not, and the others."""
    template = getattr(tokenizer, "chat_template", None)
    texts = template.values() if isinstance(template, Mapping) else [template or ""]
    named = frozenset(_ALWAYS).union(*(_variables(text) for text in texts))
    names = [
        name
        for name in given
        if name in named and name not in _OF_THE_SESSION and not hasattr(GenerationConfig(), name)
    ]
    return (
        {name: given[name] for name in names},
        {name: value for name, value in given.items() if name not in names},
    )


@lru_cache(maxsize=16)
def _variables(template: str) -> frozenset[str]:
    """Names that a template takes from outside."""
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    # transformers' own statement; what stands in it is looked at as well.
    for word in ("generation", "endgeneration"):
        for left, right in (("{%-", "-%}"), ("{%", "-%}"), ("{%-", "%}"), ("{%", "%}")):
            template = template.replace(f"{left} {word} {right}", "")
    try:
        return frozenset(meta.find_undeclared_variables(environment.parse(template)))
    except TemplateError:
        return frozenset()
