"""The report as a page: whole, self-contained; nothing that a model says is taken for markup."""

import re
from html.parser import HTMLParser

import pytest

from cometlm.eval.page import write_page
from cometlm.eval.runner import Answer


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
        meta={"decile": index % 10, "depth": 0.123456},
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

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def page(tmp_path):
    ours = [answer(i, float(i % 2)) for i in range(20)]
    theirs = [answer(i, 0.0) for i in range(20)] + [answer(20, 0.0, 4000, error="too long")]
    settings = {"model": "tiny", "task": "passkey", "seed": 0, "budget": None}
    write_page(tmp_path / "report.html", settings, {"comet": ours, "full": theirs})
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_it_is_whole_and_needs_nothing_else(page):
    reading = Reading()
    reading.feed(page)
    assert reading.open == []
    assert not re.search(r"https?:|<script|<link|src=", page)


def test_what_it_says(page):
    reading = Reading()
    reading.feed(page)
    text = " ".join(reading.text.split())
    assert "tiny on passkey" in text
    assert "budget" not in text
    assert "1 × too long" in text
    assert "0.50 0.30–0.70" in text  # of comet, with Wilson's interval
    assert "-0.50" in text  # how much less full finds
    assert "comet: 10 wrong" in text
    assert "comet: 10 right" in text
    assert "said <b>no</b>, wanted 12345" in text
    assert "depth 0.12" in text
    assert page.count("found by depth and length") == 1
    assert page.count("90–100%") == 2  # a heatmap for each method


def test_a_report_of_a_text_without_questions(tmp_path):
    lines = [
        Answer(
            tokens=100,
            index=i,
            number=0,
            question="",
            answers=(),
            said="",
            scores={"nats": 3.0 + i},
            nbytes=10,
            read_seconds=1.0,
            answer_seconds=0.0,
        )
        for i in range(3)
    ]
    write_page(tmp_path / "page.html", {"model": "m", "task": "continue"}, {"full": lines})
    assert "4.00" in (tmp_path / "page.html").read_text(encoding="utf-8")
