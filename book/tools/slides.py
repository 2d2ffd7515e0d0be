"""Write a deck of slides and a prediction sheet per chapter, and every figure as PNG.

    python book/tools/slides.py decks FOLDER
    python book/tools/slides.py png FOLDER

book/slides/CHAPTER.yml holds a deck's order, speaker notes and minutes. Figures with
captions, equations, listings and tables are read from the chapter's page, figures and
"Predict first" boxes also from its notebook, and the questions to discuss from the
instructor guide. So a deck can't differ from the book. A slide shows one of

    figure: PAPER/NAME      a figure of the page; `part: 1` shows only its first part,
                            `view: [0, 0.6]` only the upper six tenths
    output: HEADING         the first figure of the notebook's section that begins so
    equations: [LABEL]      equations of the page
    listing: FUNCTION       a listing of the page
    table: HEADER           the table of the page whose header begins so
    predict: HEADING        the "Predict first" box of the notebook's section;
                            `given: 1` adds the section's first figure
    discuss: SESSION        the questions of the instructor guide, without answers

and may have `title`, `points`, `caption: false`; each has `minutes` and `notes`, and
may have `demo`, the section of the notebook that is run.

A prediction sheet has every "Predict first" box of a notebook. `sheet` in the yml file
says, by the section's heading, what there is to fill in:

    grid: LABEL             squares to fill in, `size: [rows, columns]`; or, with
                            `values`, given numbers
    table: [COLUMNS]        a table with empty cells, and `rows` for its first column
    blank: LABEL            a line for a number
    choice: LABEL           `options` to tick
"""

import argparse
import ast
import base64
import csv
import html
import io
import re
import shutil
import string
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import nbformat
import yaml
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from PIL import Image
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from paperlib.storage import write_text

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "book" / "figures"))
import draw  # noqa: E402

SOURCES = ROOT / "book" / "slides"
STATIC = ROOT / "book" / "_static"
CHAPTERS = sorted(path.stem for path in SOURCES.glob("*.yml"))

WIDTH, HEIGHT = 1192, 460  # pixels for a figure below the title
BESIDE, TALL = 700, 714  # pixels for a figure beside the text
BROADER = 768  # if its text would be too small otherwise
READABLE = 18  # pixels of the smallest text
SMALLEST_PLOTTED = 11  # points of the smallest text in a notebook's figures
DOTS = 110  # per inch of a notebook's figures
LARGEST = 2.4  # pixels per point of a figure

DRAWN = re.compile(
    r"^```\{drawn\} (?P<name>\S+)\n:alt: (?P<alt>.+)\n\n(?P<caption>(?:.+\n)+)```$",
    re.M,
)
LISTING = r"\{literalinclude\} (?P<path>\S+)\n:pyobject: %s\n"
PREDICT = re.compile(
    r"^:::\{admonition\} Predict first\n:class: tip\n(?P<text>.*?)^:::$", re.M | re.S
)
# Of a heading: what follows a colon or a comma often tells the answer.
SHORT = re.compile(r"(?:\d\.\d: )?[^:,]*")
IMAGE = re.compile(r"data:image/\w+;base64,([A-Za-z0-9+/=]+)")
# Sentences that make no sense outside the notebook.
OF_NOTEBOOK = re.compile(
    r"\s(?:Then\s+show|The\s+next\s+two\s+notebook\s+cells|The\s+figure\s+below)"
    r"[^.]*\."
)
CELLS = re.compile(r"solar|defective|functional")
PHOTOGRAPHS = re.compile(
    r"photograph|Egyptian cat|\bcat\b|tripod|scikit|\bcup\b|espresso|rocket|astronaut"
)


@dataclass
class Figure:
    """A figure of a page or a notebook."""

    name: str
    alt: str
    caption: str  # Markdown; empty for a notebook's figure
    parts: list[str]  # HTML of an svg or img element
    sizes: list[tuple[float, float]]  # in points
    smallest: float  # points of the smallest text

    @property
    def licence(self) -> str:
        """Name the licence; the images of solar cells have their own."""
        text = f"{self.alt} {self.caption}"
        has_image = any("<image" in part or "<img" in part for part in self.parts)
        if has_image and CELLS.search(text):
            return "CC BY-NC-SA 4.0 (shows the ELPV dataset)"
        if has_image and PHOTOGRAPHS.search(text):
            return "CC BY 4.0; photographs: example data of scikit-image, scikit-learn"
        return "CC BY 4.0"


class Chapter:
    """The page, the notebook and the deck of a chapter."""

    def __init__(self, name: str):
        self.name = name
        self.page = (ROOT / "book" / f"{name}.md").read_text(encoding="utf-8")
        deck = (SOURCES / f"{name}.yml").read_text(encoding="utf-8")
        self.deck = yaml.safe_load(deck)

    @cached_property
    def figures(self) -> dict[str, Figure]:
        """Read the drawn figures of the page, in its order."""
        return {match["name"]: drawn(match) for match in DRAWN.finditer(self.page)}

    @cached_property
    def outputs(self) -> list[tuple[str, Figure]]:
        """Read the figures of the notebook, each with the heading of its section."""
        found, heading = [], ""
        for number, cell in enumerate(self.cells):
            if cell.cell_type == "markdown":
                heading = ([heading] + re.findall(r"^## (.+)", cell.source, re.M))[-1]
            for output in cell.get("outputs", []):
                data = output.get("data", {})
                for kind in set(data) & {"image/png", "image/jpeg"}:
                    alt = cell.metadata.mystnb.image.alt
                    name = f"{self.name}/cell-{number:03}"
                    found.append((heading, plotted(name, alt, kind, data[kind])))
        return found

    @cached_property
    def cells(self) -> list:
        """Read the cells of the notebook."""
        path = ROOT / "notebooks" / f"{self.name}.ipynb"
        return nbformat.read(path, as_version=4).cells

    @cached_property
    def markdown(self) -> str:
        """Join the text cells of the notebook."""
        texts = [cell.source for cell in self.cells if cell.cell_type == "markdown"]
        return "\n\n".join(texts)

    def section(self, heading: str) -> str:
        """Return the text of the only section of the notebook that begins so."""
        parts = re.split(r"^## ", self.markdown, flags=re.M)[1:]
        return only([part for part in parts if part.startswith(heading)], heading)

    def html(self, text: str) -> str:
        """Render MyST Markdown of the page: roles lose their markup."""
        numbers = {
            name.replace("/", "-").replace("_", "-"): f"Figure {int(self.name[:2])}.{i}"
            for i, name in enumerate(self.figures, 1)
        }
        text = re.sub(r"\s*\{cite:p\}`[^`]*`", "", text)
        text = re.sub(r"\s*\([\w\s]*\[(?:see )?below\]\([^)]*\)\)", "", text)
        text = re.sub(r"\{term\}`([^`<]*?)(?: <[^`]*>)?`", r"\1", text)
        text = re.sub(r"\{py:\w+\}`([^`<]*?)(?: <[^`]*>)?`", r"`\1`", text)
        text = re.sub(r"\[\]\(#([\w-]+)\)", lambda link: numbers[link[1]], text)
        text = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", text)
        text = re.sub(r"\[\^\w+\]", "", text)
        if "{" in re.sub(r"\$.*?\$|`[^`]*`", "", text, flags=re.S):
            raise ValueError(f"{self.name}: no slide can show {text!r}")
        return MARKDOWN.render(text)

    def slide(self, spec: dict) -> str:
        """Return the content of one slide."""
        title = spec.get("title", "")
        points = "".join(f"<li>{self.html(p)}</li>" for p in spec.get("points", ()))
        points = f"<ul>{points}</ul>" if points else ""
        if name := spec.get("figure"):
            figure = shown(self.figures[name], spec)
            claim, caption = re.fullmatch(
                r"\*\*(.+?)\.?\*\*(.*)", figure.caption, re.S
            ).groups()
            if not spec.get("caption", True):
                caption = ""
            return self.with_figure(figure, title or claim, points, caption)
        if spec.get("output"):
            return self.with_figure(self.output(spec), title, points, "")
        content = ""
        if labels := spec.get("equations"):
            content = "".join(map(self.equation, labels))
        elif name := spec.get("listing"):
            content = self.listing(name)
        elif header := spec.get("table"):
            content = self.table(header)
        elif heading := spec.get("predict"):
            title = "Predict first"
            box = only(PREDICT.findall(self.section(heading)), heading)
            question = self.html(OF_NOTEBOOK.sub("", box))
            content = f"<div class='question'>{question}</div>"
            if "given" in spec:
                figure = self.output({"output": heading, "number": spec["given"]})
                content += picture(figure, READABLE / figure.smallest)
        elif number := spec.get("discuss"):
            title = "Discuss"
            asked = "".join(f"<li>{self.html(q)}</li>" for q in questions(number))
            content = f"<ol>{asked}</ol>"
        head = f"<h2>{self.html(title)}</h2>"
        return f'{head}<div class="middle"><div>{content}{points}</div></div>'

    def output(self, spec: dict) -> Figure:
        """Return a figure of the notebook."""
        found = [f for heading, f in self.outputs if heading.startswith(spec["output"])]
        if not found:
            raise ValueError(f"{self.name}: no figure in a section {spec['output']!r}")
        return shown(found[spec.get("number", 1) - 1], spec)

    def opening(self, spec: dict) -> str:
        """Return the title, the paper, and the chapter's figure of the front page."""
        source = re.search(r"\*([^*]+)\*", self.page)[1]
        points = "".join(f"<p>{self.html(point)}</p>" for point in spec["points"])
        index = (ROOT / "book" / "index.md").read_text(encoding="utf-8")
        cards = re.findall(r"\{drawn\} (front/\w+)\n:alt: (.+)\n```", index)
        name, alt = cards[int(self.name[:2]) - 1]
        card = drawn({"name": name, "alt": alt, "caption": ""})
        title = html.escape(self.deck["title"])
        paper = f'<div class="caption">{self.html(source)}</div>'
        words = f'<div class="words"><h1>{title}</h1>{points}{paper}</div>'
        return f'<div class="beside">{words}{picture(card, 3)}</div>'

    def with_figure(self, figure: Figure, title: str, points: str, caption: str) -> str:
        """Place a figure beside the text, or below the title if it is wide."""
        width = sum(width for width, _ in figure.sizes)
        height = max(height for _, height in figure.sizes)
        gaps = 24 * (len(figure.sizes) - 1)
        needed = READABLE / figure.smallest
        beside = min(
            max((BESIDE - gaps) / width, min(needed, (BROADER - gaps) / width)),
            TALL / height,
            LARGEST,
        )
        wide = min((WIDTH - gaps) / width, HEIGHT / height, LARGEST)
        is_wide = wide > beside or width / height > 2.2
        scale = wide if is_wide else beside
        if scale < needed:
            raise ValueError(
                f"{figure.name}: its text would be {scale * figure.smallest:.1f} px"
                f" high; expected {READABLE}. Show one `part:` of it, or another figure"
            )
        shown_figure = picture(figure, scale)
        if not caption and figure.licence != "CC BY 4.0":
            caption = f"Images: {figure.licence}"
        caption = f'<div class="caption">{self.html(caption)}</div>' if caption else ""
        head = f"<h2>{self.html(title)}</h2>"
        if is_wide:
            return f'<div class="wide">{head}{shown_figure}{points}{caption}</div>'
        words = f'<div class="words">{head}{points}{caption}</div>'
        return f'<div class="beside">{words}{shown_figure}</div>'

    def equation(self, label: str) -> str:
        """Return an equation of the page."""
        pattern = rf"^\({re.escape(label)}\)=\n\$\$\n(.*?)\n\$\$"
        tex = only(re.findall(pattern, self.page, re.M | re.S), label)
        formula = math(tex, {"display_mode": True})
        return f'<div class="equation"><div class="math">{formula}</div></div>'

    def listing(self, name: str) -> str:
        """Return a listing of the page, as large as fits."""
        pattern = LISTING % re.escape(name)
        path = only(re.findall(pattern, self.page), name)
        source = (ROOT / "book" / path).read_text(encoding="utf-8")
        nodes = ast.walk(ast.parse(source))
        found = [node for node in nodes if getattr(node, "name", None) == name]
        code = ast.get_source_segment(source, only(found, name))
        lines = code.splitlines()
        widest = max(map(len, lines))
        size = min(30, 1150 / (0.603 * widest), 500 / (1.36 * len(lines)))
        if size < READABLE:
            raise ValueError(f"{name}: {len(lines)} lines do not fit on a slide")
        tokens = highlight(code, PythonLexer(), HtmlFormatter(nowrap=True))
        return (
            f'<pre style="font-size: {size:.1f}px"><code>{tokens.rstrip()}</code></pre>'
        )

    def table(self, header: str) -> str:
        """Return the only table of the page whose first row begins so."""
        tables = re.findall(r"^\|.*\|\n\|[-:| ]+\|\n(?:\|.*\|\n)+", self.page, re.M)
        return self.html(only([t for t in tables if t[2:].startswith(header)], header))

    def write(self, folder: Path) -> None:
        """Write the deck."""
        specs = self.deck["slides"]
        total = sum(spec["minutes"] for spec in specs)
        title = html.escape(self.deck["title"])
        frames, spent = [], 0
        for number, spec in enumerate(specs, 1):
            content = self.opening(spec) if number == 1 else self.slide(spec)
            if "demo" in spec:
                self.section(spec["demo"])  # raises if there is none
                live = f"<p><b>Live</b>, in the notebook: {spec['demo']}</p>"
            else:
                live = ""
            spent += spec["minutes"]
            timing = f"{spec['minutes']} min; {spent} of {total} when this slide ends"
            footer = f"<footer>{title} · {number} / {len(specs)}</footer>"
            frames.append(
                f'<div class="frame"><section class="slide" aria-label="Slide'
                f' {number}">{content}{footer}</section><aside class="notes">'
                f"<p><b>{timing}</b></p>{live}{self.html(spec['notes'])}</aside></div>"
            )
        template = string.Template((SOURCES / "deck.html").read_text(encoding="utf-8"))
        text = template.substitute(title=title, slides="\n".join(frames))
        write_text(folder / f"{self.name}.html", text)

    def write_predictions(self, folder: Path) -> None:
        """Write a sheet with the "Predict first" boxes of the notebook, to print."""
        items, to_fill_in = "", dict(self.deck["sheet"])
        for part in re.split(r"^## ", self.markdown, flags=re.M)[1:]:
            heading = part.partition("\n")[0]
            for box in PREDICT.findall(part):
                keys = [key for key in to_fill_in if heading.startswith(key)]
                fields = [f for key in keys for f in to_fill_in.pop(key)]
                question = self.html(OF_NOTEBOOK.sub("", box))
                items += f"<li><b>{html.escape(SHORT.match(heading)[0])}</b>{question}"
                items += '<div class="fields">'
                items += "".join(map(field, fields)) + "</div>"
                items += f"<p>{'Reason:' if fields else 'Answer and reason:'}</p>"
                items += '<div class="answer"></div></li>'
        if to_fill_in:
            raise ValueError(f"{self.name}: no box for {', '.join(to_fill_in)}")
        title = html.escape(self.deck["title"])
        content = (
            f"<h2>{title}: predict first</h2><p>Name:</p><p>Fill in each answer, and a"
            " reason, before you run the code. A wrong prediction costs nothing.</p>"
            f"<ol>{items}</ol>"
        )
        template = string.Template((SOURCES / "sheet.html").read_text(encoding="utf-8"))
        text = template.substitute(title=title, content=content)
        write_text(folder / f"{self.name}_predictions.html", text)


def field(spec: dict) -> str:
    """Return something to fill in on a prediction sheet."""
    if label := spec.get("grid"):
        rows = spec.get("values") or [[""] * spec["size"][1]] * spec["size"][0]
        cells = "".join(
            f"<tr>{''.join(f'<td>{value}</td>' for value in row)}</tr>" for row in rows
        )
        kind = "given" if "values" in spec else "empty"
        label = MARKDOWN.renderInline(label)
        return f'<table class="grid {kind}"><caption>{label}</caption>{cells}</table>'
    if columns := spec.get("table"):
        head = "".join(f"<th>{MARKDOWN.renderInline(c)}</th>" for c in ("", *columns))
        empty = "<td></td>" * len(columns)
        rows = map(MARKDOWN.renderInline, spec["rows"])
        body = "".join(f"<tr><th>{row}</th>{empty}</tr>" for row in rows)
        return f"<table><tr>{head}</tr>{body}</table>"
    if label := spec.get("blank"):
        label, _, unit = MARKDOWN.renderInline(label).partition("___")
        return f'<p>{label} <span class="blank"></span>{unit}</p>'
    options = "".join(
        f'<span class="option"><span class="box"></span> {option}</span>'
        for option in map(MARKDOWN.renderInline, spec["options"])
    )
    return f"<p>{MARKDOWN.renderInline(spec['choice'])} {options}</p>"


def math(tex: str, options: dict) -> str:
    """Leave a formula, which the plugin puts into an element `.math`, to KaTeX."""
    left, right = ("\\[", "\\]") if options["display_mode"] else ("\\(", "\\)")
    return left + html.escape(tex) + right


MARKDOWN = MarkdownIt("commonmark").enable("table")
MARKDOWN.use(dollarmath_plugin, renderer=math)


def only(found: list, name: str):
    """Return the only element."""
    if len(found) != 1:
        raise ValueError(f"{name}: expected one match, found {len(found)}")
    return found[0]


def drawn(match: re.Match | dict[str, str]) -> Figure:
    """Read a figure that a page shows."""
    files = draw.files(*match["name"].split("/"))
    parts = [path.read_text(encoding="utf-8") for path in files]
    boxes = [re.search(r'viewBox="0 0 (\S+) (\S+)"', part).groups() for part in parts]
    sizes = [(float(w), float(h)) for w, h in boxes]
    caption = match["caption"]
    # Text is drawn as paths of 100 points, which are scaled down.
    scales = re.findall(r"scale\((0\.\d+) -0?\.\d+\)", "".join(parts))
    smallest = 100 * min(map(float, scales), default=1)  # 1: without text
    return Figure(match["name"], match["alt"], caption, parts, sizes, smallest)


def shown(figure: Figure, spec: dict) -> Figure:
    """Return the part of a figure that a slide shows."""
    parts, sizes = figure.parts, figure.sizes
    if number := spec.get("part"):
        parts, sizes = parts[number - 1 : number], sizes[number - 1 : number]
    if view := spec.get("view"):
        (width, height), (top, bottom) = only(sizes, figure.name), view
        sizes = [(width, height * (bottom - top))]
        if parts[0].startswith("<svg"):
            box = f'viewBox="0 {height * top:g} {width:g} {sizes[0][1]:g}"'
            parts = [re.sub(r'viewBox="[^"]*"', box, parts[0], count=1)]
        else:
            parts = [IMAGE.sub(lambda data: cropped(data[1], top, bottom), parts[0])]
    return replace(figure, parts=parts, sizes=sizes)


def plotted(name: str, alt: str, kind: str, data: str) -> Figure:
    """Read a figure of a notebook."""
    data = "".join(data.split())
    size = Image.open(io.BytesIO(base64.b64decode(data))).size
    points = [(size[0] * 72 / DOTS, size[1] * 72 / DOTS)]
    label = html.escape(alt, quote=True)
    part = f'<img alt="{label}" src="data:{kind};base64,{data}">'
    return Figure(name, alt, "", [part], points, SMALLEST_PLOTTED)


def sized(part: str, width: float, height: float) -> str:
    """Set the size of an svg or img element in pixels."""
    tag, rest = part.split(">", 1)
    tag = re.sub(r' style="[^"]*"', "", tag)
    return f'{tag} width="{width:.0f}" height="{height:.0f}">{rest}'


def picture(figure: Figure, scale: float) -> str:
    """Return a figure at a size in pixels per point."""
    parts = "".join(
        sized(part, scale * width, scale * height)
        for part, (width, height) in zip(figure.parts, figure.sizes, strict=True)
    )
    label = html.escape(figure.alt, quote=True)
    return f'<div class="picture" role="img" aria-label="{label}">{parts}</div>'


def cropped(data: str, top: float, bottom: float) -> str:
    """Cut a share of the height out of an image in base64."""
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    rows = (round(image.height * top), round(image.height * bottom))
    buffer = io.BytesIO()
    image.crop((0, rows[0], image.width, rows[1])).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def questions(session: int) -> list[str]:
    """Read the questions to discuss in a session, without the model answers."""
    path = (ROOT / "book" / "instructor").with_suffix(".md")
    guide = path.read_text(encoding="utf-8")
    part = guide.split(f"## Session {session}:")[1].split("\n## ")[0]
    asked = part.split("**Discuss**")[1]
    found = re.findall(r"^\*([^*].+?)\*$", asked, re.M | re.S)
    if not found:
        raise ValueError(f"no questions to discuss in session {session}")
    return found


def write_decks(folder: Path) -> None:
    """Write all decks, an index of them, and the files that they share."""
    if folder.exists():
        shutil.rmtree(folder)
    static = folder / "static"
    shutil.copytree(STATIC / "katex", static)
    shutil.copy(STATIC / "render_math.js", static)
    shutil.copy(SOURCES / "deck.js", static)
    style = (SOURCES / "deck.css").read_text(encoding="utf-8")
    colours = HtmlFormatter(style="a11y-high-contrast-light").get_style_defs("pre")
    write_text(static / "deck.css", f"{style}\n{colours}\n")
    links = ""
    for name in CHAPTERS:
        chapter = Chapter(name)
        chapter.write(folder)
        chapter.write_predictions(folder)
        title = html.escape(chapter.deck["title"])
        links += f'<li>{title}: <a href="{name}.html">slides</a>,'
        links += f' <a href="{name}_predictions.html">prediction sheet</a>\n'
    page = (
        "<!DOCTYPE html><html lang=en><meta charset=utf-8><title>Slides</title>"
        f"<ul>{links}</ul><p>Keys: arrows, Home, End; n shows the speaker notes."
    )
    write_text(folder / "index.html", page)


def write_pngs(folder: Path, browser: str) -> None:
    """Write each figure of pages and notebooks as PNG, and index.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in CHAPTERS:
        chapter = Chapter(name)
        for figure in [*chapter.figures.values(), *(f for _, f in chapter.outputs)]:
            stem = figure.name.replace("/", "-")
            for number, (part, size) in enumerate(
                zip(figure.parts, figure.sizes, strict=True), 1
            ):
                path = folder / f"{stem}-{number}.png"
                if part.startswith("<img"):
                    data = IMAGE.search(part)
                    Image.open(io.BytesIO(base64.b64decode(data[1]))).save(path)
                else:
                    photograph(part, size, path, browser)
                caption = re.sub(r"<[^>]+>", "", chapter.html(figure.caption))
                caption = " ".join(html.unescape(caption).split()) or figure.alt
                rows.append((path.name, caption, figure.alt, figure.licence))
    with (folder / "index.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file", "caption", "alt text", "licence"), *rows])
    print(f"{len(rows)} figures and index.csv are in {folder}")


def photograph(svg: str, size: tuple[float, float], path: Path, browser: str) -> None:
    """Let a browser draw an SVG at 2 pixels per point and twice the resolution."""
    width, height = (round(2 * side) for side in size)
    style = (SOURCES / "deck.css").read_text(encoding="utf-8")
    svg = sized(svg, width, height)
    page = f"<style>{style} body {{ background: #fff }}</style>{svg}"
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "figure.html"
        write_text(source, f"<!DOCTYPE html><meta charset=utf-8>{page}")
        command = [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu"),
            *("--hide-scrollbars", "--force-device-scale-factor=2"),
            f"--user-data-dir={temporary}/profile",
            f"--window-size={width},{height}",
            *(f"--screenshot={path.resolve()}", source.as_uri()),
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=120)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["decks", "png"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--chromium", help="for png; default: found on the path")
    options = parser.parse_args(arguments)
    try:
        if options.what == "decks":
            write_decks(options.folder)
            return 0
        browser = (
            options.chromium
            or shutil.which("chromium")
            or shutil.which("chromium-browser")
        )
        if not browser:
            raise ValueError(
                "no chromium was found; install it, or pass --chromium PATH"
            )
        write_pngs(options.folder, browser)
    except (OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
