"""Hooks of mkdocs: pages that stand outside of `docs/`, and links that lead out of it.

Every page is written for those who read it in the repository. Its relative links are rewritten for
the site: to a page where the target is one, else to the file on GitHub. A link to nothing is left
as it is, for mkdocs to complain about.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
DOCS = "docs"

# Files of the repository by the page that they become.
PAGES = {
    "index.md": "README.md",
    "examples.md": "examples/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "recipes/passkey.md": "recipes/passkey/README.md",
}
_BECOMES = {source: page for page, source in PAGES.items()}

# A target in parentheses behind "]"; not one with a scheme, and no anchor of the same page.
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)#\s]+)(#[^)\s]*)?(?=\))")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that stand elsewhere."""
    for page, source in PAGES.items():
        path = str(ROOT / source)
        files.append(File.generated(config, page, abs_src_path=path))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite links for the site."""
    here = page.file.src_uri
    stands = PAGES.get(here, f"{DOCS}/{here}")

    def rewritten(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(stands), link[1]))
        to = _BECOMES.get(target)
        if to is None and target.startswith(f"{DOCS}/"):
            to = target.removeprefix(f"{DOCS}/")
        if to is not None and files.get_file_from_path(to):
            to = posixpath.relpath(to, posixpath.dirname(here) or ".")
        elif (ROOT / target).exists():
            kind = "tree" if (ROOT / target).is_dir() else "blob"
            to = f"{config.repo_url.rstrip('/')}/{kind}/main/{target}"
        else:
            to = link[1]
        return to + (link[2] or "")

    return _LINK.sub(rewritten, markdown)
