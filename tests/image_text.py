"""Every type of image-text model that transformers lists, tiny, and what `attach` says of its text.

`python -m tests.image_text` writes their table into docs/backbones.md. As `tests.any_backbone` does
it for language models: types are transformers' own, and configs are shrunk by their fields' names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from tests import any_backbone
from tests.any_backbone import FAILURES, CannotBuildError, Outcome

MODEL_TYPES = sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
BEGIN = "<!-- made by python -m tests.image_text -->\n"
_MOST_WEIGHTS = 20_000_000

# Fields of towers for images and sound, which are built and not run.
_TOWER = {
    "hidden_size": 32, "d_model": 32, "embed_dim": 32, "out_hidden_size": 32, "output_dim": 32,
    "projection_dim": 32, "intermediate_size": 48, "mlp_dim": 48, "encoder_ffn_dim": 48,
    "output_channels": 16, "num_hidden_layers": 1, "num_layers": 1, "depth": 1, "encoder_layers": 1,
    "num_attention_heads": 2, "num_heads": 2, "encoder_attention_heads": 2, "image_size": 28,
    "patch_size": 14, "num_position_embeddings": 64,
}  # fmt: skip
_WHOLE = {"hidden_size": 32, "projection_dim": 32, "vocab_size": 96}  # where it has such itself
# Widths of the parts of a head that turn with time, height and width.
_SECTIONS = ([2, 1, 1], [1, 1, 0])


def tiny(model_type: str) -> PreTrainedModel:
    """A random image-text model in float64 that reads text.

    Raises:
        CannotBuildError: says why.
    """
    return any_backbone.built(AutoModelForImageTextToText, _configs(model_type), _MOST_WEIGHTS)


def _configs(model_type: str) -> Iterator[Any]:
    """Small configs of a type, the best first; or why one cannot be made."""
    try:
        base: Any = AutoConfig.for_model(model_type)
        text = base.get_text_config(decoder=True)
        parts = {name: getattr(base, name, None) for name in base.sub_configs}
    except FAILURES as problem:
        yield problem
        return
    name = next((name for name, part in parts.items() if part is text), None)
    if name is None:
        yield CannotBuildError("its config holds no language model's")
        return
    said = base.to_dict()
    others: dict[str, Any] = {
        other: _shrunk(part, _TOWER) | {"model_type": part.model_type}
        for other, part in parts.items()
        if part is not None and other != name
    }
    others |= _shrunk(base, _WHOLE)
    others |= {one: 1 for one in said if one.endswith(("_token_id", "_token_index"))}
    for config in any_backbone.configs(text.model_type):
        if isinstance(config, Exception):
            yield config
            continue
        for fields in _with_sections(config.to_dict()):
            try:
                yield AutoConfig.for_model(model_type, **{name: fields}, **others)
            except FAILURES as problem:
                yield problem


def _shrunk(config: Any, smaller: dict[str, int]) -> dict[str, int]:
    return {n: value for n, value in smaller.items() if isinstance(getattr(config, n, None), int)}


def _with_sections(fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A language model's config, and with heads cut up for positions in time, height and width."""
    if "cross_attention_layers" in fields:
        fields["cross_attention_layers"] = [1]
    yield fields
    rotary = fields.get("rope_parameters")
    if isinstance(rotary, dict):
        for section in _SECTIONS:
            yield {**fields, "rope_parameters": {**rotary, "mrope_section": section}}


def outcome(model_type: str) -> Outcome:
    """Attach a memory to a tiny model of a type and compare."""
    return any_backbone.outcome(model_type, tiny)


def table(found: list[Outcome]) -> str:
    """The table of the page."""
    return any_backbone.two_tables(
        found,
        "Of {all} types of image-text models, the language models of **{fit}** get a memory:",
        "Those of the other {rest} do not, or the model could not be built tiny or reads no text "
        "without an image:",
    )


if __name__ == "__main__":
    any_backbone.walk(MODEL_TYPES, outcome, table, BEGIN)
