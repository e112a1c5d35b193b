"""A report in markdown as one HTML page that needs no other file and runs no script.

The page says what the markdown says: markdown-it-py renders it, and the tokens in between get what a page wants beside
that: headers of rows, containers in which wide tables scroll, figures as data URIs with their captions, two abreast
where there is room, and a table of contents. Markup in the text itself is shown as text, since some of it is data (what
a model wrote, the name of a folder); only what reports are marked with, underlining and subscripts, is kept, and
comments are dropped.
"""

import base64
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token

_CONTENTS_FROM = 6  # headings below the title that are worth a table of contents
_KEPT = ("<u>", "</u>", "<sub>", "</sub>")
_RIGHT = "text-align:right"
_DOTS = 1.5  # pixels of a figure per CSS pixel: drawn at 150 dots per inch, and a little larger than at 96
_BROAD = 900  # CSS pixels; a wider figure has a line of its own, since in half a line its labels are too small to read


def html_page(markdown: str, files: Mapping[str, bytes] | None = None) -> str:
    r"""The page, the same characters for the same text.

    Args:
      markdown: CommonMark with tables; its first heading is the title.
      files: relative path -> PNG, for the figures that it shows; a link to any other file stays a link.

    Returns:
      A whole HTML document.

    Example:
      >>> page = html_page("# Scores\n\n| | MSE |\n|:--|--:|\n| tap | 0.1 |\n")
      >>> '<th style="text-align:left" scope="row" class="name">tap</th>' in page
      True
    """
    parser = MarkdownIt("commonmark", {"xhtmlOut": False}).enable("table")
    tokens = parser.parse(markdown)
    for token in _all(tokens):
        if token.type in ("html_inline", "html_block"):
            token.content = _harmless(token)
        elif token.type == "image":
            _embed(token, files or {})
    _mark_row_headers(tokens)
    headings = _headings(tokens)
    title = _text(headings[0].inline) if headings else "Report"
    body = parser.renderer.render(_in_containers(tokens, headings, parser), parser.options, {})
    return _PAGE.format(title=escape(title), style=_STYLE, body=body.strip())


def _all(tokens: Sequence[Token]) -> Iterator[Token]:
    for token in tokens:
        yield token
        yield from token.children or ()


def _harmless(token: Token) -> str:
    if token.content in _KEPT:
        return token.content
    if re.fullmatch(r"<!--.*?-->\s*", token.content, re.DOTALL):
        return ""
    return f"<p>{escape(token.content)}</p>\n" if token.type == "html_block" else escape(token.content)


class _Heading(NamedTuple):
    opening: Token
    inline: Token
    id: str


def _headings(tokens: Sequence[Token]) -> list[_Heading]:
    """All headings; each gets an id of its own."""
    found: dict[str, _Heading] = {}
    for opening, inline in zip(tokens, tokens[1:], strict=False):
        if opening.type == "heading_open":
            base = re.sub(r"[^a-z0-9]+", "-", _text(inline).lower()).strip("-") or "section"
            name, number = base, 1
            while name in found:
                number += 1
                name = f"{base}-{number}"
            opening.attrSet("id", name)
            found[name] = _Heading(opening, inline, name)
    return list(found.values())


def _text(inline: Token) -> str:
    """Without markup."""
    return "".join(token.content for token in inline.children or () if token.type in ("text", "code_inline"))


def _mark_row_headers(tokens: Sequence[Token]) -> None:
    """Cells that name their row become its headers: those before the first column of numbers, else the first one.

    The last column of them is of class "name", which stays in sight when a table scrolls.
    """
    for start, token in enumerate(tokens):
        if token.type != "table_open":
            continue
        end = next(place for place in range(start, len(tokens)) if tokens[place].type == "table_close")
        cells = [place for place in range(start, end) if tokens[place].type in ("th_open", "td_open")]
        heads = [place for place in cells if tokens[place].type == "th_open"]
        right = [tokens[place].attrGet("style") == _RIGHT for place in heads]
        names = right.index(True) if True in right else 1
        for number, place in enumerate(cells):
            column, cell = number % len(heads), tokens[place]
            if number < len(heads):
                cell.attrSet("scope", "col")
            elif column < names and tokens[place + 1].content:
                cell.tag = tokens[place + 2].tag = "th"
                cell.attrSet("scope", "row")
            if column == names - 1:
                cell.attrSet("class", "name")


def _embed(image: Token, files: Mapping[str, bytes]) -> None:
    """The picture itself in the place of its path, with its size, so that nothing moves while the page loads."""
    path = str(image.attrGet("src"))
    if path not in files:
        return
    png = files[path]
    width, height = (round(pixels / _DOTS) for pixels in struct.unpack(">II", png[16:24]))  # behind the signature
    image.attrs |= {"width": width, "height": height, "style": f"--own: {width}px"}
    image.attrSet("src", "data:image/png;base64," + base64.b64encode(png).decode())
    image.meta["path"] = path


def _in_containers(tokens: Sequence[Token], headings: Sequence[_Heading], parser: MarkdownIt) -> list[Token]:
    """Tables and figures each in a box that scrolls by itself; the contents before the second heading."""
    out: list[Token] = []
    heading, place = "", 0
    while place < len(tokens):
        token = tokens[place]
        if _picture(tokens, place):
            figures, place = _figures(tokens, place)
            out += figures
            continue
        if token.type == "heading_open":
            heading = _text(tokens[place + 1])
            if len(headings) > _CONTENTS_FROM and token is headings[1].opening:
                out.append(_raw(_contents(headings[1:], parser)))
        if token.type == "table_open":
            out.append(_raw(f'<div class="wide" role="region" tabindex="0" aria-label="{escape(heading)}">\n'))
        out.append(token)
        if token.type == "table_close":
            out.append(_raw("</div>\n"))
        place += 1
    return out


def _figures(tokens: Sequence[Token], place: int) -> tuple[list[Token], int]:
    """The figures that follow each other from `place` on, in one grid, and where the text goes on behind them.

    A paragraph that begins with emphasis and comes after a picture is its caption.
    """
    out = [_raw('<div class="figures">\n')]
    while picture := _picture(tokens, place):
        broad = ' class="broad"' if int(picture.attrs["width"]) > _BROAD else ""
        link = f'<a class="wide" href="{escape(picture.meta["path"])}">'
        out += [_raw(f"<figure{broad}>{link}"), tokens[place + 1], _raw("</a>")]
        place += _PARAGRAPH
        first = next((child for child in _paragraph(tokens, place) if child.type != "text" or child.content), None)
        if first is not None and first.type == "em_open":
            out += [_raw("\n<figcaption>"), tokens[place + 1], _raw("</figcaption>")]
            place += _PARAGRAPH
        out.append(_raw("</figure>\n"))
    return [*out, _raw("</div>\n")], place


_PARAGRAPH = 3  # tokens: its opening, what it holds, its closing


def _paragraph(tokens: Sequence[Token], place: int) -> Sequence[Token]:
    """What the paragraph holds that opens at `place`; nothing where none does."""
    opens = place < len(tokens) and tokens[place].type == "paragraph_open"
    return (tokens[place + 1].children or ()) if opens else ()


def _picture(tokens: Sequence[Token], place: int) -> Token | None:
    """The embedded picture of a paragraph that has nothing else, at the token that opens it."""
    children = _paragraph(tokens, place)
    return children[0] if len(children) == 1 and children[0].meta.get("path") else None


def _raw(markup: str) -> Token:
    return Token("html_block", "", 0, content=markup)


def _contents(headings: Sequence[_Heading], parser: MarkdownIt) -> str:
    lines = []
    for heading in headings:
        shown = parser.renderer.render([heading.inline], parser.options, {})
        lines.append(f'<li class="{heading.opening.tag}"><a href="#{heading.id}">{shown}</a></li>\n')
    return (
        '<nav aria-label="Contents"><details open><summary>Contents</summary>\n'
        f"<ul>\n{''.join(lines)}</ul>\n</details></nav>\n"
    )


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """:root {
  color-scheme: light dark;
  --ink: #1c1f23; --line: #d5d9de; --ground: #fff; --shade: #f3f5f7; --link: #0b5cad;
}
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --line: #3b424a; --ground: #15181c; --shade: #1e2227; --link: #7db8f5; }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 86rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  overflow-wrap: break-word;
}
h1, h2, h3 { line-height: 1.25; margin: 2.2em 0 .6em; }
h1 { font-size: 1.7rem; } h1 code { font: inherit; } h2 { font-size: 1.35rem; } h3 { font-size: 1.05rem; }
main > h1:first-child { margin-top: 0; }
h2 { border-bottom: 1px solid var(--line); padding-bottom: .25em; }
p, li { max-width: 46rem; }
a { color: var(--link); }
code { font: .875em/1.4 ui-monospace, Menlo, Consolas, monospace; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
.wide { overflow-x: auto; margin: 1rem 0; }
.figures {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 34rem), 1fr)); grid-auto-flow: row dense;
  gap: 1rem 2rem; align-items: start; margin: 1rem 0;
}
.broad { grid-column: 1 / -1; }
figure { margin: 0; min-width: 0; }
figure .wide { display: block; margin: 0 0 .4rem; }
figcaption { max-width: 46rem; font-size: .875rem; }
table { width: max-content; border-collapse: collapse; font-size: .875rem; line-height: 1.4; }
th, td { padding: .4em .65em; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
td, thead th { white-space: nowrap; font-variant-numeric: tabular-nums; }
thead th { background: var(--shade); }
th[scope=row] { font-weight: inherit; white-space: nowrap; }
.name { position: sticky; left: 0; background: var(--ground); }
thead .name { background: var(--shade); }
td[style="text-align:left"] { white-space: normal; max-width: 26rem; }
td code { word-break: break-all; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
nav { margin: 1.5rem 0; padding: .6rem 1rem; background: var(--shade); border-radius: 4px; font-size: .875rem; }
summary { font-weight: 600; cursor: pointer; }
nav ul { list-style: none; margin: .4rem 0 0; padding: 0; columns: 22rem; column-gap: 2rem; }
nav li { break-inside: avoid; padding: .15em 0; max-width: none; }
nav .h3 { padding-left: 1rem; }
@media (max-width: 45rem) {
  body { font-size: .95rem; }
  nav ul { max-height: 11rem; overflow-y: auto; }
  th, td { padding: .4em .5em; }
  th[scope=row] { white-space: normal; max-width: 9rem; }
  td[style="text-align:left"] { max-width: 15rem; }
  figure img { max-width: none; width: max(100%, min(36rem, var(--own))); }
}
@media print { nav { display: none; } .wide { overflow: visible; } }
"""
