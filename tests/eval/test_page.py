"""The report as a page: whole, self-contained; nothing that a model says is taken for markup."""

import dataclasses
import json
import re
from html.parser import HTMLParser

import pytest

from cometlm.eval.page import write_page
from cometlm.eval.results import Cell, Results, as_plain, readable_seconds
from cometlm.eval.rows import Forecast
from cometlm.eval.runner import Answer
from tests.browser import NARROW, seen


def answer(index, score, tokens=1000, said="<b>no</b>", error=""):
    return Answer(
        tokens=tokens,
        index=index,
        number=0,
        question="Which <key>?",
        answers=("12345",),
        said=said,
        scores={} if error else {"exact": score, "found": score},
        nbytes=2048,
        peak_bytes=None,
        read_seconds=1.0,
        answer_seconds=0.5,
        meta={"decile": index % 10, "depth": 0.123456, "distance": 60 * index},
        error=error,
    )


class Reading(HTMLParser):
    """The text of a page, and tags that were not closed."""

    def __init__(self):
        super().__init__()
        self.text, self.open = "", []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += f"{data} "


SETTINGS = {"model": "tiny", "seed": 0, "budget": None, "sizes": {}}


def nats(index, tokens=100):
    return Answer(tokens, index, 0, "", [], scores={"nats": 3.0 + index}, nbytes=0)


@pytest.fixture
def results():
    ours = [answer(i, float(i % 2)) for i in range(20)] + [answer(0, 1.0, 4000)]
    theirs = [answer(i, 0.0) for i in range(20)] + [answer(20, 0.0, 4000, error="too long")]
    answers = {
        ("comet", "passkey"): ours,
        ("full", "passkey"): theirs,
        ("comet", "continue"): [nats(0), nats(1)],
        ("full", "continue"): [nats(1)],
    }
    cells = [
        Cell(method, task, tokens, samples)
        for method in ("comet", "full", "summary")
        for task, tokens, samples in (
            ("passkey", 1000, 20), ("continue", 100, 2), ("passkey", 4000, 1)
        )
    ]  # fmt: skip
    forecasts = {
        cells[0]: Forecast(1000, 0.75, 4096, [100, 300]),
        cells[8]: Forecast(4000, 7200.0, None, [1000], "would take 2.0 h, more than 1 h"),
    }
    lacking = {"documents": "the texts come with aclsum; run: pip install aclsum"}
    return Results(SETTINGS, cells, answers, forecasts, lacking)


@pytest.fixture
def page(tmp_path, results):
    write_page(tmp_path / "report.html", results)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def text_of(page):
    reading = Reading()
    reading.feed(page)
    assert reading.open == []
    return " ".join(reading.text.split())


def test_it_is_whole_and_needs_nothing_else(page):
    assert text_of(page)
    assert not re.search(r"https?:|<script|<link|src=|url\(", page)


def test_what_it_says(page):
    text = text_of(page)
    assert "tiny: comet, full, summary on passkey, continue" in text
    assert "budget" not in text
    assert "1 × too long" in text
    assert "0.50 0.30–0.70" in text  # of comet, with Wilson's interval
    assert "−0.50" in text  # how much less full finds
    assert "comet: 10 wrong" in text
    assert "comet: 10 right" in text
    assert "said <b>no</b> right 12345" in text
    assert "1,140 back" in text
    assert "documents : the texts come with aclsum" in text
    assert "summary passkey 4,000 1 would take 2.0 h, more than 1 h 2.0 h – 1k" in text
    assert "comet passkey 1,000 100, 300 15 s 30 s 2.00 4.0 KiB" in text  # foreseen, and took
    assert "4.00 one text" in text  # nats have no bounds then
    assert page.count("90–100%") == 2  # a heatmap for each method


def test_every_picture_is_said_in_words_and_figures(page):
    pictures = re.findall(r'role="img" aria-label="([^"]+)"', page)
    assert len(pictures) == page.count("as a table") >= 4
    assert "passkey: found by tokens of comet, full; the figures are in the table below" in pictures
    assert not re.findall(r"\bnan\b|\binf\b", page)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_telephone(chromium, tmp_path, results, scheme):
    """Wide tables scroll by themselves; nothing is asked for, and nothing goes wrong."""
    results.answers["comet", "passkey"][0] = dataclasses.replace(
        answer(0, 0.0, said="x" * 400), read=300, open_nbytes=1024
    )
    write_page(tmp_path / "report.html", results)
    with seen(chromium, tmp_path / "report.html", color_scheme=scheme) as found:
        for _ in range(2):
            assert found.width <= NARROW
            assert found.hidden("main section, h1, h2, nav a") == []
            found.open_all()
        assert found.hidden("figure, figure svg, li") == []
        assert {"Overview", "Answers", "Skipped", "Not measured", "Time and memory"} <= set(
            found.page.locator("main h2").all_text_contents()
        )
        for link in found.page.locator("nav a").all():
            assert found.page.locator(link.get_attribute("href")).count() == 1
        assert found.wrong == []


def test_results_are_plain(results):
    plain = as_plain(results)
    again = json.loads(json.dumps(plain, allow_nan=False))
    first, *_, last = again["cells"]
    assert first["scores"]["found"]["mean"] == 0.5
    assert first["foreseen"]["seconds"] == {"foreseen": 15.0, "measured": 30.0, "ratio": 2.0}
    assert first["foreseen"]["from_lengths"] == [100, 300]
    assert last["skipped"] == "would take 2.0 h, more than 1 h"
    assert (last["texts"], last["foreseen"]["seconds"]["measured"]) == (0, None)
    long = next(one for one in again["cells"] if one["tokens"] == 4000 and one["method"] == "full")
    assert long["errors"] == {"count": 1, "first": "too long"}
    nats = next(one for one in again["cells"] if (one["method"], one["tokens"]) == ("full", 100))
    assert nats["scores"]["nats"] == {"mean": 4.0, "low": 0.0, "high": None}
    assert {one["method"] for one in again["differences"]} == {"full"}
    assert again["machine"]["torch"]


def test_texts_that_are_shorter_than_was_asked_are_said(tmp_path, results):
    def read(name, *lengths):
        own = results.answers[name, "passkey"]
        own[:] = [dataclasses.replace(one, read=lengths[one.index % len(lengths)]) for one in own]

    read("comet", 880)
    read("full", 880)
    shorter = {"comet, full on passkey, 1,000 tokens": "shorter: 880 tokens",
               "comet on passkey, 4,000 tokens": "shorter: 880 tokens"}  # fmt: skip
    assert results.shorter_texts == shorter
    write_page(tmp_path / "short.html", results)
    text = text_of((tmp_path / "short.html").read_text(encoding="utf-8"))
    assert all(f"{name}: {why}" in text for name, why in shorter.items())
    first, *_ = as_plain(results)["cells"]
    assert (first["read"], first["shorter"]) == ([880] * 20, "shorter: 880 tokens")
    even = dataclasses.replace(results, uneven={"passkey"})
    assert not even.shorter_texts
    assert as_plain(even)["cells"][0]["shorter"] == ""
    read("full", 1000, 899, 700, 900)
    fresh = dataclasses.replace(results)
    assert fresh.shorter_texts["full on passkey, 1,000 tokens"] == (
        "10 of 20 texts shorter: 700 … 899 tokens"
    )


def test_means_that_are_no_numbers_are_none(results):
    broken = dataclasses.replace(nats(0), scores={"nats": float("nan")})
    results.answers["comet", "continue"][:] = [broken]
    again = json.loads(json.dumps(as_plain(results), allow_nan=False))
    cell = next(one for one in again["cells"] if (one["method"], one["tokens"]) == ("comet", 100))
    assert cell["scores"]["nats"]["mean"] is None


def test_a_judge_comes_first(results):
    for own in results.answers["comet", "passkey"]:
        own.scores["judged"] = 1.0
    assert results.main_score("passkey") == "judged"


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.04, "0.0 s"), (12.3, "12 s"), (150, "2.5 min"), (7200, "2.0 h")]
)
def test_seconds(seconds, said):
    assert readable_seconds(seconds) == said
