"""What a memory does when it reads a text and answers: gates, ages, attention, and its sources."""

from cometlm.inspection.attention import PARTS
from cometlm.inspection.explanation import Explanation
from cometlm.inspection.history import Entry, History, Passage, SeenChunk
from cometlm.inspection.session import InspectedSession

__all__ = [
    "PARTS",
    "Entry",
    "Explanation",
    "History",
    "InspectedSession",
    "Passage",
    "SeenChunk",
]
