"""The site's pages say all that is public; `make docs` checks their links."""

import re
from pathlib import Path

import pytest

import cometlm
from cometlm.cli.main import app

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference"


def test_every_public_name_is_in_the_reference():
    pages = "\n".join(page.read_text(encoding="utf-8") for page in REFERENCE.glob("*.md"))
    described = re.findall(r"^::: cometlm\.(\w+)$", pages, re.MULTILINE)
    assert [name for name in cometlm.__all__ if described.count(name) != 1] == []
    index = (REFERENCE / "index.md").read_text(encoding="utf-8")
    assert [name for name in cometlm.__all__ if f"[cometlm.{name}]" not in index] == []


def test_every_verb_is_in_the_reference():
    page = (REFERENCE / "cli.md").read_text(encoding="utf-8")
    verbs = {command.name for command in app.registered_commands}
    assert set(re.findall(r"^\| `cometlm (\w+)", page, re.MULTILINE)) == verbs


@pytest.fixture
def hooks(monkeypatch):
    pytest.importorskip("mkdocs")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import hooks

    return hooks


@pytest.mark.parametrize(
    ("page", "link", "becomes"),
    [
        ("index.md", "docs/training.md#modes", "training.md#modes"),
        ("index.md", "docs/passkey.png", "passkey.png"),
        ("index.md", "CONTRIBUTING.md", "contributing.md"),
        ("index.md", "benchmarks", "https://example.org/cometlm/tree/main/benchmarks"),
        ("training.md", "results.md", "results.md"),
        ("training.md", "../recipes/passkey/README.md", "recipes/passkey.md"),
        ("training.md", "../gpu/run.sh", "https://example.org/cometlm/blob/main/gpu/run.sh"),
        ("recipes/passkey.md", "../../docs/results.md#training", "../results.md#training"),
        ("training.md", "#modes", "#modes"),
        ("training.md", "https://example.com/a.md", "https://example.com/a.md"),
        ("training.md", "nowhere.md", "nowhere.md"),
    ],
)
def test_links_lead_to_pages_or_to_the_repository(hooks, page, link, becomes):
    class Files:
        def get_file_from_path(self, path):
            return path in hooks.PAGES or (ROOT / "docs" / path).exists()

    class Site:
        repo_url = "https://example.org/cometlm/"

    class Page:
        class file:
            src_uri = page

    text = hooks.on_page_markdown(f"See [it]({link}).", Page, Site, Files())
    assert text == f"See [it]({becomes})."
