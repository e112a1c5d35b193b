"""The HTML page of a report: same contents, no other file, no foreign markup, readable by everybody."""

import html.parser
import json
import re
import shutil
import subprocess

import pytest

from tap_jax.evaluation import page
from tap_jax.evaluation.page import html_page

VOID = ("img", "meta", "br", "hr", "col")


class Page(html.parser.HTMLParser):
    """What a page holds, by its tags.

    Attributes:
      tags: (name, attributes) of every element, in order.
      tables: per table its rows, a row being [(tag, attributes, text), ...].
      open: elements that have not been closed; none in the end.
    """

    def __init__(self, text):
        super().__init__()
        self.tags, self.tables, self.open, self.text, self._cell = [], [], [], [], None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = [tag, attributes, ""]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self.tables[-1][-1].append(tuple(self._cell))
            self._cell = None

    def handle_data(self, data):
        if self._cell:
            self._cell[2] += data
        elif self.open and self.open[-1] != "style":
            self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def markdown_tables(text):
    """Tables of markdown as rows of plain texts, read without a markdown parser."""
    tables, inside = [], False
    for line in text.splitlines():
        if not line.startswith("|"):
            inside = False
        elif not inside:
            tables.append([line])
            inside = True
        else:
            tables[-1].append(line)

    def plain(cell):
        cell = re.sub(r"(?<!\\)(\*\*?|`|</?u>)", "", cell.strip())
        return re.sub(r"\\(.)", r"\1", cell)

    rows = [[re.split(r"(?<!\\)\|", line)[1:-1] for line in (table[0], *table[2:])] for table in tables]
    return [[[plain(cell) for cell in row] for row in table] for table in rows]


def check_page(text, markdown, files=()):
    """What holds for every page; `files` are those that lie beside it."""
    found = Page(text)
    assert text.startswith("<!DOCTYPE html>") and found.open == []
    assert [[[cell for _, _, cell in row] for row in table] for table in found.tables] == markdown_tables(markdown)
    # No other file and no script.
    assert not {"script", "link", "iframe", "object", "base", "form"} & {tag for tag, _ in found.tags}
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    assert all(image["src"].startswith("data:image/png;base64,") for image in found.all("img"))
    assert "url(" not in text and "@import" not in text
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    targets = [link["href"] for link in found.all("a")]
    assert all(target[1:] in ids if target.startswith("#") else target in files for target in targets)
    # Readable by everybody.
    assert found.all("html") == [{"lang": "en"}] and {"name": "viewport", "content": page_width()} in found.all("meta")
    assert all(image["alt"] for image in found.all("img"))
    for table in found.tables:
        head, *body = table
        assert {(tag, attributes["scope"]) for tag, attributes, _ in head} == {("th", "col")}
        assert {attributes["scope"] for row in body for tag, attributes, _ in row if tag == "th"} <= {"row"}
    boxes = [box for box in found.all("div") if box["class"] == "wide"]
    assert len(boxes) == len(found.tables) and all(box["tabindex"] == "0" and box["aria-label"] for box in boxes)
    return found


def page_width():
    return "width=device-width, initial-scale=1"


def test_a_page_says_what_the_markdown_says():
    markdown = (
        "# Scores & more\n\n| | a ↓ |\n|:--|--:|\n| tap | **0.1** ± 0.2 |\n| local | <u>3</u> |\n\n[CSV](a.csv)\n"
    )
    found = check_page(html_page(markdown), markdown, ["a.csv"])
    assert found.all("title") and "Scores & more" in found.text
    assert [[tag for tag, _, _ in row] for row in found.tables[0]] == [["th", "th"], ["th", "td"], ["th", "td"]]
    assert len(found.all("strong")) == len(found.all("u")) == 1
    assert html_page(markdown) == html_page(markdown)


def test_rows_are_named_by_what_stands_before_the_numbers():
    """The cells left of the first column of numbers; the first alone where there is none; never an empty one."""
    head = "| Model | Method | x |\n|:--|:--|--:|\n| FLAVA | TAP | 1 |\n| | Local | 2 |\n"
    (table,) = Page(html_page(head)).tables
    assert [[tag for tag, _, _ in row] for row in table[1:]] == [["th", "th", "td"], ["td", "th", "td"]]
    (table,) = Page(html_page(head.replace("--:|\n", ":--|\n"))).tables
    assert [[tag for tag, _, _ in row] for row in table[1:]] == [["th", "td", "td"], ["td", "td", "td"]]


@pytest.mark.parametrize(
    "hostile",
    [
        "<script>alert(1)</script>",
        "before <script>alert(1)</script> <b onclick=x>",
        "<img src=x onerror=alert(1)>",
        "<style>*{display:none}</style>",
        "<u onmouseover=alert(1)>",
        "[x](javascript:alert(1))",
        "<!--> <script>alert(1)</script> -->",
        "| a |\n|:--|\n| <iframe src=x> |",
        '![" onerror="alert(1)](x.png" onerror="alert(1))',
    ],
)
def test_markup_in_the_text_is_text(hostile):
    text = html_page(f"# Notes\n\n{hostile}\n\nNote: {hostile}\n")
    found = Page(text)
    kept = {"html", "head", "meta", "title", "style", "body", "main", "h1", "p", "div", "table", "thead", "tbody", "tr"}
    assert {tag for tag, _ in found.tags} <= kept | {"th", "td"}
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    shown = " ".join([*found.text, *(cell for table in found.tables for row in table for _, _, cell in row)])
    assert max(re.findall(r"\w+", hostile), key=len) in shown


def test_figures_are_in_the_page_with_their_size(png):
    markdown = "# F\n\n![What it shows](figures/a.png)\n\n*What it shows.*\n"
    found = check_page(html_page(markdown, {"figures/a.png": png}), markdown, ["figures/a.png"])
    (image,) = found.all("img")
    assert (image["width"], image["height"], image["alt"]) == ("40", "20", "What it shows")


def test_figures_that_follow_each_other_share_a_grid_and_keep_their_captions(png):
    """A broad one has a line of its own; what is no caption comes after the grid."""
    names = ["a.png", "b.png", "broad.png"]
    shown = [f"![{name}]({name})\n\n*About {name}.* Runs: r1." for name in names]
    markdown = "\n\n".join(["# F", *shown, "Text.", shown[0]])
    files = {"a.png": png, "b.png": png, "broad.png": picture(1800, 30)}
    text = html_page(markdown, files)
    found = check_page(text, markdown, names)
    first, second = text.split("<p>Text.</p>")
    assert first.count('<div class="figures">') == second.count('<div class="figures">') == 1
    assert [figure.get("class") for figure in found.all("figure")] == [None, None, "broad", None]
    captions = re.findall(r'<img src="\S+" alt="(\S+)"[^>]*></a>\s*<figcaption>(.*)</figcaption></figure>', text)
    assert captions == [(name, f"<em>About {name}.</em> Runs: r1.") for name in (*names, "a.png")]


@pytest.fixture(scope="module")
def png():
    return picture(60, 30)


def picture(width, height):
    import io

    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(stream, "png")
    return stream.getvalue()


def test_a_long_report_has_contents():
    sections = [f"## Part {n} *x*<sub>i</sub>" for n in range(7)] + ["## Part 0 *x*<sub>i</sub>"]
    markdown = "\n\n".join(["# Long", "text", *sections])
    found = check_page(html_page(markdown), markdown)
    assert len(found.all("nav")) == 1 and len(found.all("li")) == len(sections)
    assert [link["href"] for link in found.all("a")][0::7] == ["#part-0-xi", "#part-0-xi-2"]
    assert not Page(html_page("# Short\n\n## One\n")).all("nav")


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_have_contrast(scheme):
    """4.5 to 1 at least, WCAG 2 AA."""
    roots = re.findall(r":root \{(.*?)\}", page._STYLE, re.DOTALL)
    colors = dict(re.findall(r"--(\w+): #(\w+);", roots[scheme]))

    def luminance(name):
        digits = colors[name] if len(colors[name]) == 6 else "".join(2 * digit for digit in colors[name])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for front in ("ink", "link"):
        for back in ("ground", "shade"):
            low, high = sorted((luminance(front), luminance(back)))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (front, back)


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --allow-file-access-from-files --virtual-time-budget=5000"
).split()


def test_nothing_is_wider_than_a_phone(tmp_path):
    """In a real browser, at desktop and phone width: the page does not scroll sideways, its tables do.

    Figures stand side by side on the desktop, below each other on the phone.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser here: {', '.join(BROWSERS)}")
    wide = " | ".join(f"column {n}" for n in range(40))
    table = f"| {wide} |\n|{':--|' * 40}\n| {' | '.join('0.1234 ± 0.0001' for _ in range(40))} |"
    code = f"Folder `{'/very_long_name' * 20}` {'x' * 300}"
    markdown = f"# Report\n\n## Wide\n\n{table}\n\n{code}\n\n![A figure](a.png)\n\n![Another](a.png)\n"
    (tmp_path / "report.html").write_text(html_page(markdown, {"a.png": picture(900, 630)}))
    (tmp_path / "frames.html").write_text(FRAMES)
    command = [browser, *FLAGS, f"--user-data-dir={tmp_path}/profile", "--dump-dom", f"file://{tmp_path}/frames.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    measured = re.search(r"<title>(\[.*?\])</title>", done.stdout)
    assert measured, done.stderr[-2000:]
    for width, found in zip((1280, 390), json.loads(measured[1]), strict=True):
        assert found["window"] == width and found["page"] <= width, found
        assert found["table"] > width and found["picture"] > 0, found
        assert (found["tops"][0] == found["tops"][1]) == (width == 1280), found


FRAMES = """<!DOCTYPE html><title></title>
<iframe src="report.html" style="border: 0; width: 1280px; height: 800px"></iframe>
<iframe src="report.html" style="border: 0; width: 390px; height: 800px"></iframe>
<script>
onload = () => {
  document.title = JSON.stringify([...document.querySelectorAll("iframe")].map(frame => {
    const inner = frame.contentDocument;
    return {
      window: frame.contentWindow.innerWidth, page: inner.documentElement.scrollWidth,
      table: inner.querySelector(".wide").scrollWidth, picture: inner.querySelector("img").naturalWidth,
      tops: [...inner.querySelectorAll("figure")].map(figure => figure.offsetTop),
    };
  }));
};
</script>
"""
