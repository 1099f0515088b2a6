"""How keys are hidden in texts and asked for.

Wordings to train with and wordings to measure with are kept apart, so that a measurement never
repeats a sentence of the training. Those to train with are many: gates that were fitted to the
first 23 stayed shut at one key in three of other wordings, mostly where the number comes first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# fmt: off
_WHATS = (
    "pass key", "access code", "secret number", "passcode", "account number", "serial number",
    "ticket number", "telephone extension", "locker number", "registration number",
)
# fmt: on


@dataclass(frozen=True)
class Wording:
    """How keys are hidden and asked for.

    Attributes:
        hidden: sentences with {key}, maybe {what}, and {owner} where a key belongs to somebody.
        asked: questions, likewise; one without {what} asks for the number.
        answered: answers with {key}.
        whats: what a key may be called; a sentence and its question agree on it.
    """

    hidden: tuple[str, ...]
    asked: tuple[str, ...]
    answered: tuple[str, ...] = ("{key}",)
    whats: tuple[str, ...] = ("number",)

    def first(self, count: int | None, owned: bool = False) -> Wording:
        """The first so many sentences, questions and names, or all.

        Args:
            owned: take as many with an owner too, which several keys in one text need.
        """
        if count is None:
            return self

        def few(sentences: tuple[str, ...]) -> tuple[str, ...]:
            kinds: tuple[list[str], list[str]] = ([], [])
            for sentence in sentences:
                kinds["{owner}" in sentence].append(sentence)
            return (*kinds[0][:count], *(kinds[1][:count] if owned else ()))

        hidden, asked = few(self.hidden), few(self.asked)
        return replace(self, hidden=hidden, asked=asked, whats=self.whats[:count])


TRAINING = Wording(
    hidden=(
        "The {what} is {key}. Remember it. {key} is the {what}.",
        "Remember this: the {what} is {key}.",
        "There is an important number in this text. It is {key}. Keep it in mind.",
        "Note: the {what} is {key}.",
        "Here is the {what} that matters: {key}.",
        "Do not forget that {key} is the {what}.",
        "{key} is the {what}. You will be asked for it.",
        "The {what} of {owner} is {key}. Remember it.",
        "Please keep in mind that the {what} of {owner} is {key}.",
        "The number that belongs to {owner} is {key}.",
        "{owner}: {what} {key}. Do not forget it.",
        "As for {owner}, the {what} is {key}.",
        "Write this down: {key}.",
        "Do not tell anyone, but the {what} is {key}.",
        "She whispered it twice so that nobody would forget: {key}.",
        "Whoever asks for the {what} should be told {key}.",
        "The {what}, as everybody here knows, is {key}; nothing else will do.",
        "Use {key} to get in.",
        "{key} - that is the {what}, in case it is needed.",
        "The only figure of any importance here is {key}.",
        "If they want the {what}, say {key}.",
        "You can reach {owner} under {key}.",
        "They gave {owner} the {what} {key}.",
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
        "{key} is the {what} for {owner}.",
        "To get to {owner}, enter {key}.",
        "{owner} goes by the {what} {key} from today.",
        "For {owner} they chose {key} as the {what}.",
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
    ),
    asked=(
        "What is the {what}?",
        "Which {what} was mentioned in the text?",
        "What is the {what}? Answer with the number only.",
        "What was the number that I should remember?",
        "Which number did the text ask you to remember?",
        "Please repeat the {what}.",
        "What is the {what} of {owner}?",
        "Which number belongs to {owner}?",
        "What is the {what} of {owner}? Answer with the number only.",
        "Please repeat the number of {owner}.",
        "What was the {what} again?",
        "I forgot the {what}. What was it?",
        "Can you tell me the {what}?",
        "Give me the number from the text.",
        "Which digits were you told to keep?",
        "What did the text say about {owner}?",
        "Can you tell me the number of {owner}?",
    ),
    whats=_WHATS,
)
MEASURING = Wording(
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
)
