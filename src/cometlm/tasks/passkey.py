"""Passkeys: a number hidden somewhere in a long text, and a question about it at the end.

Train and test share no sentences, questions, owners or corpora. There are many sentences to train
with: a memory that was trained with a few keeps only numbers that are said in just these ways.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cometlm.tasks.base import Question, Sample, Split
from cometlm.tasks.names import PEOPLE
from cometlm.tasks.story import (
    DECILES,
    StoryTask,
    bounds,
    capital,
    check_share,
    is_whole,
    room_beside,
)


@dataclass(frozen=True)
class Templates:
    """How numbers are hidden and asked for.

    Attributes:
        hidden: sentences with {key}, maybe {what}, and {owner} where a number belongs to somebody.
        asked: questions, likewise.
        owners: whom a number may belong to.
        whats: what a number may be called; a sentence and its question agree on it.
    """

    hidden: tuple[str, ...]
    asked: tuple[str, ...]
    owners: tuple[str, ...]
    whats: tuple[str, ...] = ("number",)


class Passkey(StoryTask):
    """A number hidden in real text.

    Args:
        tokenizer, split, seed: see `Task`.
        digits: of a number, or their fewest and most.
        keys: how many numbers are hidden, or their fewest and most. With more than one, each has
            an owner.
        questions: how many of them are asked for at most, each on its own.
        depth: where the number stands that is asked for first, 0 (start of the text) … 1 (end);
            None: anywhere.
        corpora: names that `corpus_files` knows, taken in turn. Default: those of the split.
        samples_per_text: so many samples in a row hide their numbers in the same text, each in
            another equal part of it. What stands before a number need then be read only once.

    Raises:
        ValueError: an option out of its bounds.
        OSError: when sampling, a corpus that cannot be fetched.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        split: Split = "test",
        seed: int = 0,
        digits: int | Sequence[int] = 5,
        keys: int | Sequence[int] = 1,
        questions: int = 1,
        depth: float | None = None,
        corpora: str | Sequence[str] | None = None,
        samples_per_text: int = 1,
    ) -> None:
        super().__init__(tokenizer, split=split, seed=seed, corpora=corpora)
        self.templates = TEMPLATES[split]
        self.digits = bounds("digits", digits, 100)
        self.keys = bounds("keys", keys, len(self.templates.owners))
        for name, value in (("questions", questions), ("samples_per_text", samples_per_text)):
            if not is_whole(value) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        self.questions = questions
        self.depth = None if depth is None else check_share("depth", depth)
        self.samples_per_text = samples_per_text

    def sample(self, index: int, tokens: int) -> Sample:
        """A sample with a context of exactly `tokens` tokens; see `Task.sample`.

        Its `meta` says the `depth` and `decile` of the number that is asked for first, and the
        corpus that is the `haystack`.
        """
        text, part = divmod(index, self.samples_per_text)
        rng = self.rng(index)
        count = rng.randint(*self.keys)
        owners = rng.sample(self.templates.owners, count) if self._has_owners(rng, count) else [""]
        depths = [rng.random() for _ in owners]
        depths[0] = (part + depths[0]) / self.samples_per_text if self.depth is None else self.depth
        hidden = [self._hidden(rng, owner) for owner in owners]
        needles = [self._needle(rng, fields) for fields in hidden]
        room_beside(needles, tokens)
        name, haystack = self.haystack(text)
        # All samples of a text draw it with the same generator, and as long.
        text_rng = random.Random(f"text/{self.split}/{self.seed}/{text}")
        running = haystack.draw(text_rng, tokens)
        context, ranges = self.tell(running, needles, depths, tokens)
        questions = tuple(
            Question(self._asked(rng, fields), (fields["key"],), evidence=(where,))
            for fields, where in list(zip(hidden, ranges, strict=True))[: self.questions]
        )
        decile = min(DECILES - 1, int(depths[0] * DECILES))
        meta = {"depth": depths[0], "decile": decile, "haystack": name}
        return Sample(context, questions, meta)

    def score(self, question: Question, said: str) -> dict[str, float]:
        """How good an answer is.

        Returns:
            `exact`: nothing but the number was said. `found`: it was, maybe in a sentence, and no
            other number. `digits`: the share that is right, place by place, in the first number
            that was said.
        """
        (key,) = question.answers
        numbers = re.findall(r"\d+", said)
        pairs = zip(key, numbers[0] if numbers else "", strict=False)
        return {
            **super().score(question, said),
            "found": float(set(numbers) == {key}),
            "digits": sum(a == b for a, b in pairs) / len(key),
        }

    def _has_owners(self, rng: random.Random, count: int) -> bool:
        """Several numbers have owners, and one in two that are alone."""
        return count > 1 or rng.random() < 0.5

    def _hidden(self, rng: random.Random, owner: str) -> dict[str, str]:
        digits = rng.randint(*self.digits)
        key = str(rng.randrange(10 ** (digits - 1), 10**digits))
        return {"owner": owner, "what": rng.choice(self.templates.whats), "key": key}

    def _needle(self, rng: random.Random, fields: dict[str, str]) -> list[int]:
        return self.needle(rng, capital(_fitting(rng, self.templates.hidden, fields)))

    def _asked(self, rng: random.Random, fields: dict[str, str]) -> str:
        return _fitting(rng, self.templates.asked, fields)


def _fitting(rng: random.Random, templates: Sequence[str], fields: dict[str, str]) -> str:
    """One of those that have a place for an owner if there is one, and none if not, filled in."""
    has_owner = bool(fields["owner"])
    return rng.choice([t for t in templates if ("{owner}" in t) == has_owner]).format(**fields)


# --- what is said -------------------------------------------------------------------------------

# fmt: off
_TRAIN_OWNERS = (
    *PEOPLE["train"], "the archive", "the boiler room", "the north gate",
    "the safe", "the library", "the vault", "the greenhouse", "the server", "the old cabin",
    "the ferry", "the laboratory", "the museum", "the garage", "the attic", "the school",
)
_TEST_OWNERS = (
    *PEOPLE["test"],
    "the lighthouse", "the bakery", "the chapel", "the wine cellar", "the observatory",
    "the stables", "the post office", "the theatre", "the mill", "the harbour office",
)
_WHATS = (
    "pass key", "access code", "secret number", "passcode", "account number", "serial number",
    "ticket number", "telephone extension", "locker number", "registration number",
)
# fmt: on

_TRAIN_HIDDEN = (
    "The {what} is {key}. Remember it. {key} is the {what}.",
    "Remember this: the {what} is {key}.",
    "There is an important number in this text. It is {key}. Keep it in mind.",
    "Note: the {what} is {key}.",
    "Here is the {what} that matters: {key}.",
    "Do not forget that {key} is the {what}.",
    "{key} is the {what}. You will be asked for it.",
    "Write this down: {key}.",
    "Do not tell anyone, but the {what} is {key}.",
    "She whispered it twice so that nobody would forget: {key}.",
    "Whoever asks for the {what} should be told {key}.",
    "The {what}, as everybody here knows, is {key}; nothing else will do.",
    "Use {key} to get in.",
    "{key} - that is the {what}, in case it is needed.",
    "The only figure of any importance here is {key}.",
    "If they want the {what}, say {key}.",
    "{key} is what the guard wants to hear.",
    "Only {key} will be accepted as the {what}.",
    "With {key} you can switch off the alarm.",
    "It was {key} that they agreed on as the {what}.",
    "P.S. {key} is the {what} from now on.",
    "On the back of the photograph it said {key}.",
    "Attention: {key} is needed to start the machine.",
    "I was given {key} as my {what}.",
    "Dial {key} and wait.",
    "Whatever happens, hold on to {key}.",
    "All of this would be useless without the {what}, {key}.",
    "Later on somebody will want to know the {what}: {key}.",
    "Careful, {key} is the one figure that must not be lost.",
    "Memorise {key}; you will need it at the end.",
    "Learn this by heart: {key}.",
    "NB: {key}, and nothing else, is the {what}.",
    "(The {what} is {key}.)",
    "SECRET - {what} {key} - DO NOT LOSE",
    "To do: somebody is going to ask for {key}, so keep it.",
    "Grandmother always said the {what} was {key}.",
    "The voice on the telephone repeated {key} and hung up.",
    "He scribbled {key} on his hand before he left.",
    "The slip under the lamp says {key}.",
    "Engraved inside the ring: {key}.",
    "Your {what} has been changed to {key}.",
    "We have set your {what} to {key}; keep it safe.",
    "{key} will be asked for at the gate.",
    "Nothing counts here except {key}.",
    "{key} gets you past the porter.",
    "Without {key} nobody is let in.",
    "The answer to every question that follows is {key}.",
    "Somewhere further on you are asked for a figure, and it is {key}.",
    "Reader, take {key} with you; the last page asks for it.",
    "One number matters in these pages, namely {key}.",
    "To unlock the chest, turn the dial to {key}.",
    "The padlock yields to {key}.",
    "Enter {key} when the machine wants the {what}.",
    "When you are asked who sent you, say {key}.",
    "Tell them {key} and they will let you through.",
    "Agent, your {what} for this mission is {key}.",
    "Every member knows {key}, the {what} of the club.",
    "My {what}? That would be {key}.",
    '"What is the {what}?" he asked. "{key}," she said.',
    '"{key}," she said, "and never forget it."',
    "The parcel can be fetched with {key}.",
    "The treasure lies behind a lock that knows only {key}.",
    "It all comes down to {key}.",
    "The {what} used to be another; now it is {key}.",
    "He made me repeat {key} until I knew it.",
    "A slip of paper fell out, and on it was written {key}.",
    "Should the lights go out, type {key}.",
    "{key} stops the clock.",
    "{key} ends the quarantine, so hold on to it.",
    "It is {key} which lets you into the cellar.",
    "Quick, memorise {key} before it is gone!",
    "Here comes the number to remember, {key}, and that is all.",
    "All I ask of you is to remember {key}.",
    "Let {key} be your {what}.",
    "For use at the end: {key}.",
    "Keep this: {what} {key}.",
    "What they asked me to pass on is the number {key}.",
    "Concealed in this text is {key}, the {what}.",
    "The winning ticket bears {key}.",
    "Just between us, the {what} is {key}.",
    "Alert! {key} is the {what} that disarms the bomb.",
    "Urgent: {key} is what the pilot has to hear.",
    "Hint: {key} is the number that the lift needs.",
    "Remember, {key} is the sequence which restarts the pump.",
    "Tip: {key} is the {what} that gets the gate to move.",
    "Secret! {key} is the {what} under which the money lies.",
    "Listen: {key} is the figure I told you about.",
    "The {what} of {owner} is {key}. Remember it.",
    "Please keep in mind that the {what} of {owner} is {key}.",
    "The number that belongs to {owner} is {key}.",
    "{owner}: {what} {key}. Do not forget it.",
    "As for {owner}, the {what} is {key}.",
    "You can reach {owner} under {key}.",
    "They gave {owner} the {what} {key}.",
    "{key} is the {what} for {owner}.",
    "To get to {owner}, enter {key}.",
    "{owner} goes by the {what} {key} from today.",
    "For {owner} they chose {key} as the {what}.",
    "{key} is how {owner} is reached.",
    "The {what} assigned to {owner}: {key}.",
    "On the sign for {owner} it says {key}.",
    "Nobody gets near {owner} without {key}.",
    "Since last week {owner} has had {key} as the {what}.",
    "Whoever needs {owner} has to give {key}.",
    "Ask for {owner}, and say {key}.",
    "We registered {owner} under {key}.",
    "Remember {key}: it belongs to {owner}.",
    "The key to {owner} is the number {key}.",
    "Note for {owner}: {key} is the {what} that you get.",
    "As {what} of {owner}, {key} has been agreed on.",
    "{owner} can be found with {key}, and with that only.",
)
_TRAIN_ASKED = (
    "What is the {what}?",
    "Which {what} was mentioned in the text?",
    "What is the {what}? Answer with the number only.",
    "What was the number that I should remember?",
    "Which number did the text ask you to remember?",
    "Please repeat the {what}.",
    "What was the {what} again?",
    "I forgot the {what}. What was it?",
    "Can you tell me the {what}?",
    "Give me the number from the text.",
    "Which digits were you told to keep?",
    "What is the {what} of {owner}?",
    "Which number belongs to {owner}?",
    "What is the {what} of {owner}? Answer with the number only.",
    "Please repeat the number of {owner}.",
    "What did the text say about {owner}?",
    "Can you tell me the number of {owner}?",
)
TEMPLATES: dict[Split, Templates] = {
    "train": Templates(_TRAIN_HIDDEN, _TRAIN_ASKED, _TRAIN_OWNERS, _WHATS),
    "test": Templates(
        hidden=(
            "By the way, the magic number you will need later is {key}.",
            "Somebody wrote the PIN on the wall: {key}.",
            "Important: {key} is the code that opens the door.",
            "The combination for {owner} happens to be {key}.",
        ),
        asked=(
            "What is the number you will need later?",
            "Tell me the code that was hidden in the text.",
            "What was the secret code?",
            "What is the combination for {owner}?",
        ),
        owners=_TEST_OWNERS,
    ),
}
