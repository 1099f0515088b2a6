"""Real text without questions: learned as language, and measured by how well it is foreseen."""

from __future__ import annotations

from cometlm.tasks.base import Sample
from cometlm.tasks.story import StoryTask


class Continuation(StoryTask):
    """Running text of a corpus.

    A mixture learns all of it. An evaluation says its `nats` per token, each token after all that
    stand before it: the lower, the better.

    Args:
        tokenizer, split, seed, corpora: see `StoryTask`.
    """

    def sample(self, index: int, tokens: int) -> Sample:
        """A sample with a context of exactly `tokens` tokens; see `Task.sample`."""
        name, haystack = self.haystack(index)
        return Sample(haystack.draw(self.rng(index), tokens), meta={"haystack": name})
