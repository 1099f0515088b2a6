"""Generation: transformers' `generate()` over a memory instead of a growing KV cache.

A full chunk folds into memory while decoding and the next one begins (SPEC §4), so a hundred
thousand generated tokens hold what a thousand do. A cache that has already read goes in as
`past_key_values` together with the *new* ids only: transformers slices `input_ids` by the cache's
length, so that length counts from the ids of one call.

Pitfalls:
    - `generate` returns a cache that has not read the last token it generated; give that token
      first when going on from it. `Session` does.
    - Pad prompts on the left, as for every decoder.
"""

from __future__ import annotations

import functools
from typing import Any, NoReturn

from transformers import GenerationMixin, LogitsProcessorList
from transformers.generation import SuppressTokensLogitsProcessor

from cometlm.compat import CACHE, takes_either_name
from cometlm.core.cache import CometCache
from cometlm.core.fixed_cache import FixedCache
from cometlm.core.text_batch import text_alone


class MemoryGenerationMixin(GenerationMixin):
    """`GenerationMixin` whose cache is a `CometCache`."""

    config: Any
    device: Any
    model: Any

    @takes_either_name
    def generate(self, *args: Any, past_key_values: CometCache | None = None, **kwargs: Any) -> Any:
        """Write, as transformers' `generate()` does, from `past_key_values` (or `cache`) on.

        Raises:
            ValueError: `inputs_embeds` or images instead of ids; what `forward` refuses.
        """
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError("generate() does not take inputs_embeds: a memory reads token ids")
        if past_key_values is not None:
            kwargs[CACHE] = past_key_values
        inherited: Any = super()
        return inherited.generate(*args, **text_alone(kwargs))

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # its signature is looked at
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Inputs of the next step: without the tokenizer that stop strings are looked for with.

        transformers hands it on to `forward`, as if it were an input of the model.
        """
        kwargs.pop("tokenizer", None)
        inherited: Any = super()
        inputs: dict[str, Any] = inherited.prepare_inputs_for_generation(*args, **kwargs)
        return inputs

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not possible: it packs rows into pages of a key-value cache.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "continuous batching keeps pages of keys and values, and a memory has none: use "
            "generate(), which takes rows of any lengths in one batch"
        )

    generate_batch = continuous_batching_context_manager = init_continuous_batching

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """Put a cache that counts from this call into `model_kwargs`, a row for every sequence."""
        kind = generation_config.cache_implementation
        if kind not in (None, "static"):
            raise ValueError(
                f"cache_implementation must be None or 'static', got {kind!r}: the memory is the "
                "cache"
            )
        given = model_kwargs.get(CACHE)
        if given is None and generation_config.use_cache is False:
            return
        if kind and (generation_config.num_beams or 1) > 1:
            raise ValueError(
                "cache_implementation='static' writes in place, which beams cannot share: "
                f"num_beams must be 1, got {generation_config.num_beams}"
            )
        cache: CometCache = self.model.cache_for(given, batch_size)
        copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        rows = [row for row in range(batch_size) for _ in range(copies)]
        cache = cache.select(rows).restarted()
        whole: Any = self
        model_kwargs[CACHE] = FixedCache(whole, cache) if kind else cache

    def _reorder_cache(self, cache: CometCache, beam_idx: Any) -> CometCache:
        """The cache of the beams that go on."""
        return cache.select(beam_idx.tolist())

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        """Mask the reserved rows of published checkpoints, whatever the caller suppresses."""
        inherited: Any = super()
        processors: LogitsProcessorList = inherited._get_logits_processor(*args, **kwargs)
        reserved = self.config.suppressed_tokens
        if reserved:
            processors.insert(0, SuppressTokensLogitsProcessor(reserved, device=self.device))
        return processors
