"""Turns one documentation file (HTML or POD) into blocks of clean English. Knows no packages, no splits.

A block is a heading, a paragraph, a list item, a piece of code or the term that a definition follows; menus,
tables of contents and tables are left behind.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Literal

__all__ = ["Block", "blocks_of", "is_prose", "render"]

Kind = Literal["heading", "text", "item", "code", "term"]


def _names(listed: str) -> frozenset[str]:
    return frozenset(listed.split())


_VOID_TAGS = _names("br hr img input link meta col wbr area base embed source track param")
_SKIPPED_TAGS = _names("script style nav header footer head table svg form button select aside sup")
_SKIPPED_CLASSES = _names(
    """
    sphinxsidebar related headerlink toc navheader navfooter toctree-wrapper contents nosearch menu fancy_toc
    toplang bottomlang sidebar nav-chapters nav-wrapper menu-bar quickview up top seealso footer clearer
    docs-navigation-links docs-sidebar-nav sphinx-tabs versionadded versionmodified viewcode-link
    admonition-title browse-horizontal document-navigation buttons
    """
)
_SKIPPED_IDS = _names(
    "page-header path sidebar menu-bar quickview footer comments_section docs-top-navigation-container hd ft"
)
_BLOCK_TAGS = _names(
    """
    p div li dd dt h1 h2 h3 h4 h5 h6 ul ol dl blockquote section article tr td th body main pre figure details
    summary
    """
)
_CLOSED_BY_NEXT = {"p": {"p"}, "li": {"li", "p"}, "dd": {"dd", "dt", "p"}, "dt": {"dd", "dt", "p"}}
_HEADINGS = _names("h1 h2 h3 h4 h5 h6")
_CHARACTERS = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "-",
        "\u2014": "--",
        "\u2026": "...",
        "\u00a0": " ",
        "\u00b6": " ",
        "\u00ad": None,
    }
)
_COMMON_WORDS = _names(
    """
    the a an of to and in is that for it as with be are or this by on not can if you which from when will has
    have at but all use used any one no may was only its so do then than into there your we they he
    """
)
_WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")


@dataclass(frozen=True, slots=True)
class Block:
    """One piece of a document, white space already normalised; only code keeps line breaks."""

    kind: Kind
    text: str


def blocks_of(path: Path) -> list[Block]:
    """The blocks of a file: POD by its suffix, anything else as HTML."""
    text = path.read_bytes().decode("utf-8", errors="replace")
    return list(_pod_blocks(text)) if path.suffix == ".pod" else _html_blocks(text)


def is_prose(text: str, fewest_words: int = 8) -> bool:
    """Whether a paragraph reads as English: enough words, common ones among them, mostly letters."""
    words = _WORD.findall(text)
    if len(words) < fewest_words or len(text) > 6000 or "\ufffd" in text:
        return False
    common = sum(word.lower() in _COMMON_WORDS for word in words)
    letters = sum(character.isalpha() or character == " " for character in text)
    foreign = sum(character > "\x7f" for character in text)
    return common >= 0.18 * len(words) and letters >= 0.86 * len(text) and foreign <= 0.01 * len(text)


def render(blocks: list[Block]) -> str:
    """Blocks as plain text: one line for each paragraph, a blank line between, items with a dash."""
    lines: list[str] = []
    for index, block in enumerate(blocks):
        follows_item = index > 0 and block.kind == "item" == blocks[index - 1].kind
        if index > 0 and not follows_item:
            lines.append("")
        lines.append("- " + block.text if block.kind == "item" else block.text)
    return "\n".join(lines) + "\n"


def _clean(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).translate(_CHARACTERS).split())


def _clean_code(text: str) -> str:
    lines = [line.rstrip().expandtabs(4) for line in text.translate(_CHARACTERS).strip("\n").split("\n")]
    margin = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    return "\n".join("    " + line[margin:] if line.strip() else "" for line in lines).rstrip()


class _HtmlReader(HTMLParser):
    """Collects blocks; tolerates unclosed p and li; drops blocks that are mostly links."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[Block] = []
        self._open: list[str] = []
        self._skip_at: int | None = None  # depth of the skipped element, while inside one
        self._pieces: list[str] = []
        self._link_chars = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _BLOCK_TAGS:
            self._flush()
        if tag in _VOID_TAGS:
            self._pieces.append("\n" if tag == "br" else " ")
            return
        while self._open and self._open[-1] in _CLOSED_BY_NEXT.get(tag, ()):
            self._close_last()
        self._open.append(tag)
        if self._skip_at is None and _is_skipped(tag, dict(attrs)):
            self._skip_at = len(self._open)

    def handle_endtag(self, tag: str) -> None:
        if tag in _BLOCK_TAGS:
            self._flush()
        if tag not in self._open:
            return
        while self._open[-1] != tag:
            self._close_last()
        self._close_last()

    def handle_data(self, data: str) -> None:
        if self._skip_at is not None:
            return
        self._pieces.append(data)
        if "a" in self._open:
            self._link_chars += len(data)

    def finish(self) -> list[Block]:
        self.close()
        self._flush()
        return self.blocks

    def _close_last(self) -> None:
        if self._skip_at == len(self._open):
            self._skip_at = None
        self._open.pop()

    def _kind(self) -> Kind:
        for tag in reversed(self._open):
            if tag in _HEADINGS:
                return "heading"
            if tag == "pre":
                return "code"
            if tag == "li":
                return "item"
            if tag == "dt":
                return "term"
        return "text"

    def _flush(self) -> None:
        raw, links = "".join(self._pieces), self._link_chars
        kind = self._kind()
        self._pieces, self._link_chars = [], 0
        if links > 0.7 * len(raw) and kind not in ("heading", "term"):
            return
        text = _clean_code(raw) if kind == "code" else _clean(raw)
        if text.strip():
            self.blocks.append(Block(kind, text))


def _is_skipped(tag: str, attrs: dict[str, str | None]) -> bool:
    classes = set((attrs.get("class") or "").split())
    return tag in _SKIPPED_TAGS or bool(classes & _SKIPPED_CLASSES) or (attrs.get("id") or "") in _SKIPPED_IDS


def _html_blocks(text: str) -> list[Block]:
    reader = _HtmlReader()
    reader.feed(text)
    return reader.finish()


_POD_CODE = re.compile(r"[A-Z](?:<<+\s(.*?)\s>>+|<([^<>]*)>)", re.DOTALL)
_POD_ESCAPES = {"lt": "<", "gt": ">", "verbar": "|", "sol": "/", "quot": '"', "amp": "&"}


def _pod_inline(text: str) -> str:
    """Formatting codes removed, innermost first; L<text|target> keeps its text, X<> and Z<> vanish."""

    def plain(match: re.Match[str]) -> str:
        inner = match[1] if match[1] is not None else match[2]
        letter = match[0][0]
        if letter == "E":
            return {"lt": "\ue000", "gt": "\ue001"}.get(inner, _POD_ESCAPES.get(inner, inner))
        if letter in "XZ":
            return ""
        if letter == "L":
            return inner.split("|")[0].strip("/")
        return inner.replace("<", "\ue000").replace(">", "\ue001")

    for _ in range(4):
        text = _POD_CODE.sub(plain, text)
    return text.replace("\ue000", "<").replace("\ue001", ">")


def _pod_blocks(text: str) -> Iterator[Block]:
    skipping = False
    for paragraph in re.split(r"\n\s*\n", text):
        if paragraph.startswith(("=begin", "=end")):
            skipping = paragraph.startswith("=begin")
        elif skipping or paragraph.startswith(("=for", "=encoding", "=over", "=back", "=cut", "=pod")):
            continue
        elif paragraph.startswith("=head"):
            yield Block("heading", _clean(_pod_inline(paragraph.partition(" ")[2])))
        elif paragraph.startswith("=item"):
            yield Block("item", _clean(_pod_inline(paragraph.partition(" ")[2].lstrip("*0123456789. "))))
        elif paragraph.startswith((" ", "\t")):
            yield Block("code", _clean_code(paragraph))
        elif paragraph.strip():
            yield Block("text", _clean(_pod_inline(paragraph)))
