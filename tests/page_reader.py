"""Reads HTML pages strictly, as their tests want them: closed elements, unique names, nothing fetched."""

import base64
import hashlib
import re
from html.parser import HTMLParser

# What has no end tag in HTML.
VOID = {"meta", "input", "br", "hr", "img", "link"}
# A name that would be markup, a formula or a control character.
HOSTILE = '<script>alert("1")</script><!--</script>&amp;$x^2$\u0001'


class Page(HTMLParser):
    """Reads a page strictly: elements are closed in their order, names are unique, references stay inside."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.names: list[str] = []
        self.references: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.figure = ""
        self.drawn: set[str] = set()
        self.titles: dict[str, str] = {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        assert len(found) == len(attrs), (tag, attrs)
        self.elements.append((tag, found))
        if name := found.get("id"):
            self.names.append(name)
        for attribute, value in attrs:
            assert not attribute.startswith("on"), (tag, attribute)
            if attribute in ("href", "xlink:href", "src", "action", "data"):
                self.references.append(value or "")
            self.references += re.findall(r"url\(([^)]*)\)", value or "")
        if tag == "figure":
            self.figure = found["id"] or ""
        if tag == "svg":
            self.drawn.add(self.figure)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, (tag, self.open)

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)
            if self.open[-1] == "h2" and "figure" in self.open:
                self.titles[self.figure] = data


def read_page(text: str) -> Page:
    """Read a page: nothing is fetched, and no script runs but one that its policy names."""
    page = Page(text)
    assert len(page.names) == len(set(page.names))
    assert {f"#{name}" for name in page.names} >= set(page.references)
    assert not re.search(r"https?:|//[a-z]|@import|xmlns", re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL))
    (policy,) = [found["content"] for tag, found in page.elements if found.get("http-equiv")]
    assert all(found.get("type") in (None, "application/json") for tag, found in page.elements if tag == "script")
    run = [found for tag, found in page.elements if tag == "script" and not found]
    allowed = "'none'"
    if run:
        digest = base64.b64encode(hashlib.sha256(page.texts["script"][-1].encode()).digest()).decode()
        allowed = f"'sha256-{digest}'"
    assert len(run) < 2 and policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}"
    return page
