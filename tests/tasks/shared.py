"""What tests of tasks share: text to hide things in, and sentences read back."""

import re

PROSE = "The ship left the harbour in the rain. It carried salt, iron and two hundred letters.\n"


def decoded(words, sample, where):
    """The sentence that stands somewhere in a context."""
    return words.decode(sample.context[where.start : where.stop]).strip()


def pattern(template):
    """What matches sentences made of a template, with its fields as groups."""
    made, seen = "", set()
    capital = template[:1].upper() + template[1:]
    for place, part in enumerate(re.split(r"\{(\w+)\}", capital)):
        if place % 2 == 0:
            made += re.escape(part)
        else:
            made += f"(?P={part})" if part in seen else f"(?P<{part}>.+?)"
            seen.add(part)
    return re.compile(made)


def read(template, sentence):
    """The fields of a sentence, or None if it is made of another template."""
    found = pattern(template).fullmatch(sentence)
    return found and found.groupdict()
