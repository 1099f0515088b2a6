"""Pages that need nothing else, in Chromium, as narrow as a telephone."""

import contextlib
from dataclasses import dataclass, field
from typing import Any

NARROW = 360  # CSS pixels


@dataclass
class Seen:
    """A page that is looked at, and what is wrong with it.

    Attributes:
        page: Playwright's.
        wrong: errors, and what it asked for besides itself.
    """

    page: Any
    wrong: list[str] = field(default_factory=list)

    @property
    def width(self):
        """Of all that would have to be scrolled over."""
        return self.page.evaluate("document.documentElement.scrollWidth")

    def open_all(self):
        """Everything that is folded away."""
        self.page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")

    def hidden(self, selector):
        """Texts of those elements that cannot be seen, or reach beyond the page's edge."""
        found = []
        for one in self.page.locator(selector).all():
            box = one.bounding_box()
            if not one.is_visible() or box["x"] < 0 or box["x"] + box["width"] > NARROW:
                found.append(one.text_content()[:80])
        return found


@contextlib.contextmanager
def seen(chromium, path, **options):
    """A file in the browser."""
    context = chromium.new_context(viewport={"width": NARROW, "height": 640}, **options)
    try:
        found, own = Seen(context.new_page()), path.as_uri()

        def note(asked):
            if not asked.url.startswith((own, "data:")):
                found.wrong.append(asked.url)

        found.page.on("pageerror", lambda error: found.wrong.append(str(error)))
        found.page.on("console", lambda said: found.wrong.append(said.text))
        found.page.on("request", note)
        found.page.goto(own)
        yield found
    finally:
        context.close()
