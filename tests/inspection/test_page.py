"""The folder that an inspection leaves: page, pictures, numbers."""

import json
import re

import pytest
import torch

from cometlm.inspection import InspectedSession, pictures
from cometlm.inspection.numbers import numbers, plain
from cometlm.inspection.page import _decoded, percent, sources, write
from tests.browser import NARROW, seen
from tests.sessions import TEXT, model_of, tokenizer_of

QUESTION = "Who <b>wrote</b> & why?"


def session_of(kind, text=TEXT):
    session = InspectedSession(model_of(kind), tokenizer_of(kind))
    session.read(text)
    list(session.finish())
    return session


def page_of(folder):
    return (folder / "index.html").read_text(encoding="utf-8")


@pytest.fixture
def no_pictures(monkeypatch):
    """They take longest."""
    monkeypatch.setattr("cometlm.inspection.page.why_none", lambda: "none")


@pytest.mark.parametrize("kind", ["overlap", "no global", "no temporary"])
def test_a_page_that_needs_nothing_else(kind, tmp_path):
    pytest.importorskip("matplotlib")
    session = session_of(kind)
    found = session.explain(QUESTION, answer="wind 37, naïve", template=False)
    write(tmp_path, session, found, note="a <note>")
    page = page_of(tmp_path)
    assert "Who &lt;b&gt;wrote&lt;/b&gt; &amp; why?" in page
    assert "a &lt;note&gt;" in page
    assert "<script" not in page
    loaded = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", page)
    assert {one for one in loaded if not one.startswith(("#", "data:"))} == set()
    names = {path.stem for path in tmp_path.glob("*.png")}
    assert page.count("<svg") == len(names)
    own = set() if kind == "no global" else {"gates", "shares", "ages"}
    assert names == {"attention", "parts", "sources", "tokens", "heads", *own}
    json.loads((tmp_path / "inspection.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_telephone(chromium, tmp_path, scheme):
    pytest.importorskip("matplotlib")
    session = session_of("overlap")
    write(tmp_path, session, session.explain(QUESTION, answer="wind " * 40, template=False))
    with seen(chromium, tmp_path / "index.html", color_scheme=scheme) as found:
        assert found.width <= NARROW
        assert found.hidden("h1, h2, summary") == []
        found.open_all()
        assert found.width <= NARROW
        assert found.hidden("h1, h2, p, svg") == []
        assert found.page.locator("h2").all_text_contents() == [
            "The answer", "The reading", "What this does not say"
        ]  # fmt: skip
        assert found.wrong == []


def test_a_page_of_a_reading(tmp_path):
    session = session_of("llama")
    write(tmp_path, session, None)
    assert "The answer" not in page_of(tmp_path)
    assert "answer" not in json.loads((tmp_path / "inspection.json").read_text())


def test_a_page_of_a_short_text(tmp_path, no_pictures):
    session = session_of("llama", "On day 1")
    write(tmp_path, session, session.explain("Who?", answer="x", template=False))
    assert "there is no memory yet" in page_of(tmp_path)


def test_a_page_of_a_saved_session_says_what_it_cannot_know(tmp_path, no_pictures):
    session = session_of("llama")
    session.save(tmp_path / "s")
    loaded = InspectedSession.load(tmp_path / "s", session.model, session.tokenizer)
    write(tmp_path, loaded, loaded.explain("Who?", answer="x", template=False))
    page = page_of(tmp_path)
    assert "read the text again" in page
    assert "(its text is not known)" in page
    assert json.loads((tmp_path / "inspection.json").read_text())["ages"][0][0] is None


def test_without_matplotlib_the_page_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("cometlm.extras.find_spec", lambda name: None)
    write(tmp_path, session_of("llama"), None)
    assert "pip install" in page_of(tmp_path)
    assert "<svg" not in page_of(tmp_path)
    assert pictures.why_none()


@pytest.mark.parametrize("kind", ["llama", "like gemma"])
def test_texts_on_the_page_are_whole(kind, tmp_path, no_pictures):
    """Characters of several tokens, and tokens that lose their space when they stand alone."""
    session = session_of(kind)
    write(tmp_path, session, session.explain("naïve ☂️?", answer="naïve ☂️", template=False))
    assert "\ufffd" not in page_of(tmp_path)
    ids = session.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    for size in (1, 3):
        groups = [ids[i : i + size] for i in range(0, len(ids), size)]
        assert "".join(_decoded(session.tokenizer, groups)) == session.tokenizer.decode(ids)


def test_sources_are_ordered_and_named():
    session = session_of("llama")
    found = session.explain("Who?", answer="wind", template=False)
    named = sources(found, most=5)
    masses = [one.mass for one in named]
    assert masses == sorted(masses, reverse=True)
    assert masses[0] == pytest.approx(float(found.traced.max()))
    for one in named:
        passage = found.history.passages[int(one.chunks)]
        ids = found.session.token_ids(passage.begin, passage.end)
        assert one.text == session.tokenizer.decode(ids).strip("\ufffd")
    assert sum(one.looked for one in sources(found, most=999)) == pytest.approx(1, rel=1e-4)


def test_numbers_are_what_the_session_knows():
    session = session_of("overlap")
    found = session.explain("Who?", answer="wind and sea", template=False)
    given = numbers(session, found)
    assert given["passages"][3]["gates"] == plain(session.history.passages[3].gates)
    assert torch.tensor(given["answer"]["parts"]).shape == found.parts.shape
    assert given["entries"][-1] == [session.history.chunks - 1, *given["entries"][-1][1:]]
    for name in given["axes"]:
        outer, _, inner = name.rpartition(".")
        holder = given[outer] if outer else given
        assert inner in (holder[0] if isinstance(holder, list) else holder)


def test_plain_numbers():
    assert plain(torch.tensor([[1.23456, float("nan")], [0, float("inf")]])) == [
        [1.235, None],
        [0, None],
    ]
    assert [percent(x) for x in (None, float("nan"), 0.0, 0.0123, 0.5)] == [
        "unknown", "unknown", "0%", "1.2%", "50%",
    ]  # fmt: skip
