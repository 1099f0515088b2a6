"""Generation: transformers' `generate()` over a memory instead of a growing KV cache.

A full chunk folds into memory while decoding and the next one begins (SPEC §4), so a hundred
thousand generated tokens hold what a thousand do. A cache that has already read goes in as
`past_key_values` together with the *new* ids only: transformers slices `input_ids` by the cache's
length, so that length counts from the ids of one call.

Footguns:
    - `generate` returns a cache that has not read the last token it generated; give that token
      first when going on from it. `Session` does.
    - Pad prompts on the left, as for every decoder.
"""

from __future__ import annotations

from typing import Any

from transformers import GenerationMixin, LogitsProcessorList
from transformers.generation import SuppressTokensLogitsProcessor

from cometlm.cache import CometCache


class MemoryGenerationMixin(GenerationMixin):
    """`GenerationMixin` whose cache is a `CometCache`."""

    config: Any
    device: Any
    model: Any

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """Put a cache that counts from this call into `model_kwargs`, a row for every sequence."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} does not apply: "
                "the memory is the cache"
            )
        given = model_kwargs.get("past_key_values")
        if given is None and generation_config.use_cache is False:
            return
        cache: CometCache = self.model.cache_for(given, batch_size)
        copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        rows = [row for row in range(batch_size) for _ in range(copies)]
        model_kwargs["past_key_values"] = cache.select(rows).restarted()

    def _reorder_cache(self, past_key_values: CometCache, beam_idx: Any) -> CometCache:
        """The cache of the beams that go on."""
        return past_key_values.select(beam_idx.tolist())

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        """Mask the reserved rows of published checkpoints, whatever the caller suppresses."""
        inherited: Any = super()
        processors: LogitsProcessorList = inherited._get_logits_processor(*args, **kwargs)
        reserved = self.config.suppressed_tokens
        if reserved:
            processors.insert(0, SuppressTokensLogitsProcessor(reserved, device=self.device))
        return processors
