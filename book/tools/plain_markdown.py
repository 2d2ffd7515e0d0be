"""Convert the MyST Markdown of a notebook to Markdown that every viewer renders.

Jupyter Book resolves directives, citations and references when it builds a page; Colab
shows their source. A directive or role that this module does not know raises an error,
so that no source is published: support it below, or write the cell without it.
"""

import ast
import base64
import json
import mimetypes
import re
from pathlib import Path

from pybtex.database import BibliographyData
from pybtex.richtext import Text

FORMULA = re.compile(r"(?<![\\$])\$(?!\$)[^$`]+?(?<!\\)\$(?!\$)")  # in a line of text
FENCE = re.compile(
    r"^(?P<marks>`{3,}|:{3,}|~{3,})(?:\{(?P<name>[\w:-]+)\})?\s*(?P<argument>.*)$"
)
OPTION = re.compile(r"^:([\w-]+):\s*(.*)$")
SPAN = re.compile(
    r"\{(?P<role>[a-z][\w:-]*)\}`(?P<text>[^`]+)`|(?P<code>(`+)(?!`).+?(?<!`)\4(?!`))",
    re.S,
)
LABELLED = re.compile(r"^\$\$[ ]*\((?P<label>[\w:-]+)\)[ ]*$", re.M)
LINK = re.compile(
    r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)(?P<attributes>\{[^}]*\})?"
)
ENVIRONMENT = re.compile(
    r"^\\begin\{(?P<name>\w+\*?)\}.*?^\\end\{(?P=name)\}[ ]*$", re.M | re.S
)

ADMONITIONS = {
    *"admonition attention caution danger error hint important note seealso".split(),
    *"tip warning margin sidebar".split(),
}
FOLDED = {"dropdown", "toggle", "solution"}
DROPPED = set("bibliography contents exercise-end solution-end tableofcontents".split())
TRANSPARENT = {"div", "tab-set"}


class PlainMarkdown:
    """Convert the Markdown cells of a notebook.

    Equations and exercises are numbered across all cells.

    Args:
        cells: the Markdown sources, in order.
        folder: the notebook's folder, against which links and included files are
            resolved.
        root: the repository's root.
        references: the book's bibliography.
        pages: address of the published book; if empty, links between pages become
            plain text, the first to each page with the page's title.
    """

    def __init__(
        self,
        cells: list[str],
        folder: Path,
        root: Path,
        references: BibliographyData,
        pages: str = "",
    ):
        self.cells, self.folder, self.root = cells, folder, root
        self.references, self.pages = references, pages
        text = "\n".join(cells)
        self.labels: dict[str, str] = {}
        self.titled: set[str] = set()
        equations = [
            *LABELLED.finditer(text),
            *re.finditer(
                r"^(?:`{3,}|:{3,})\{math\}\s*\n:label:\s*(?P<label>\S+)", text, re.M
            ),
        ]
        equations.sort(key=lambda match: match.start())
        for number, match in enumerate(equations, start=1):
            self.labels[match["label"]] = f"({number})"
        exercise = (
            r"^(?:`{3,}|:{3,})\{exercise(?:-start)?\}[^\n]*\n"
            r"(?:(?::(?!label)[^\n]*)\n)*:label:\s*(\S+)"
        )
        for number, match in enumerate(re.finditer(exercise, text, re.M), start=1):
            self.labels[match[1]] = f"Exercise {number}"

    def convert(self) -> list[str]:
        """Return every cell as plain Markdown."""
        return [self._blocks(cell.splitlines()).strip("\n") for cell in self.cells]

    def _blocks(self, lines: list[str]) -> str:
        """Convert lines, fence by fence."""
        blocks: list[str] = []
        text: list[str] = []
        position = 0
        while position < len(lines):
            opening = FENCE.match(lines[position])
            if not opening:
                text.append(lines[position])
                position += 1
                continue
            end = _closing(lines, position, opening["marks"])
            body = lines[position + 1 : end]
            blocks.append(self._text("\n".join(text)))
            if opening["name"]:
                blocks.append(
                    self._directive(opening["name"], opening["argument"].strip(), body)
                )
            else:
                blocks.append("\n".join(lines[position : end + 1]))
            text, position = [], end + 1
        blocks.append(self._text("\n".join(text)))
        return "\n".join(block for block in blocks if block)

    def _directive(self, name: str, argument: str, body: list[str]) -> str:
        options, body = _options(body)
        content = "\n".join(body)
        title = self._text(argument)
        if name in DROPPED:
            return ""
        if name in TRANSPARENT:
            return self._blocks(body)
        if name in FOLDED or (
            name in ADMONITIONS and "dropdown" in options.get("class", "")
        ):
            summary = "Solution" if name == "solution" else title or name.capitalize()
            opening = f"<details><summary><b>{summary}</b></summary>"
            return f"{opening}\n\n{self._blocks(body)}\n\n</details>\n"
        if name in ADMONITIONS:
            heading = title or name.capitalize()
            # In a quotation, "> " would be a part of a formula of two lines.
            content = FORMULA.sub(
                lambda match: match[0].replace("\n", " "), self._blocks(body)
            )
            quoted = [f"**{heading}**", "", *content.splitlines()]
            return "\n".join(f"> {line}".rstrip() for line in quoted) + "\n"
        if name in ("exercise", "exercise-start"):
            number = self.labels.get(options.get("label", ""), "Exercise")
            heading = f"{number} ({title})" if title else number
            return f"**{heading}**\n\n{self._blocks(body)}"
        if name == "solution-start":
            exercise = self.labels.get(argument, argument)
            return f"**Solution to {exercise}**\n\n{self._blocks(body)}"
        if name == "tab-item":
            return f"**{title}**\n\n{self._blocks(body)}"
        if name == "math":
            label = options.get("label")
            return f"$$\n{content}{self._tag(label) if label else ''}\n$$"
        if name in ("figure", "image"):
            image = f"![{options.get('alt', '')}]({self._picture(argument)})"
            return f"{image}\n\n{self._blocks(body)}".rstrip() + "\n"
        if name in ("code-block", "code"):
            return f"```{argument}\n{content}\n```"
        if name == "literalinclude":
            language = options.get("language", "python")
            return f"```{language}\n{self._included(argument, options)}\n```"
        if name == "raw" and argument == "html":
            return content
        raise ValueError(
            f"the directive {{{name}}} has no plain Markdown;"
            " use another, or convert it in book/tools/plain_markdown.py"
        )

    def _text(self, text: str) -> str:
        text = re.sub(r"^\([\w:.-]+\)=[ ]*\n?", "", text, flags=re.M)
        if lost := re.search(r"^[^#%\n][^\n]*\n(%[^\n]*)", text, re.M):
            raise ValueError(
                f"{lost[1]!r} is a comment in MyST, within a paragraph;"
                " break the line elsewhere"
            )
        text = re.sub(r"^%[^\n]*\n?", "", text, flags=re.M)
        text = LABELLED.sub(
            lambda match: self._tag(match["label"]).lstrip("\n") + "\n$$", text
        )
        text = ENVIRONMENT.sub(self._environment, text)
        # Code is not changed. A link's text may contain code, so links are converted
        # last, and only outside code.
        return self._links(
            SPAN.sub(
                lambda match: match["code"] or self._role(match["role"], match["text"]),
                text,
            )
        )

    def _environment(self, match: re.Match) -> str:
        # Other viewers render these environments only between dollar signs.
        before = match.string[: match.start()].rstrip()
        return match[0] if before.endswith("$$") else f"$$\n{match[0]}\n$$"

    def _tag(self, label: str) -> str:
        return f"\n\\tag{{{self.labels[label].strip('()')}}}"

    def _role(self, role: str, text: str) -> str:
        title, _, target = re.fullmatch(r"(.*?)(\s*<([^<>]+)>)?", text, re.S).groups()
        if role.startswith("cite"):
            return self._citation(role, text)
        if role == "eq":
            return self._known(role, text)
        if role in ("ref", "numref"):
            return title if target else self._known(role, text)
        if role == "doc":
            return f"[{title}]({target or text})"
        if role.startswith("py:"):
            return f"`{text.rpartition('.')[2] if text.startswith('~') else title}`"
        if role in ("term", "abbr"):
            return title
        if role == "math":
            return f"${text}$"
        if role in ("sub", "sup"):
            return f"<{role}>{text}</{role}>"
        raise ValueError(
            f"the role {{{role}}}`{text}` has no plain Markdown;"
            " write it as text, or convert it in book/tools/plain_markdown.py"
        )

    def _known(self, role: str, label: str) -> str:
        if label not in self.labels:
            raise ValueError(
                f"{{{role}}}`{label}` is not an equation or exercise of this notebook;"
                f" expected one of {', '.join(self.labels) or '(none)'}, or a title:"
                f" {{ref}}`text <{label}>`"
            )
        return self.labels[label]

    def _citation(self, role: str, keys: str) -> str:
        citations = []
        for key in re.split(r"\s*,\s*", keys.strip()):
            if key not in self.references.entries:
                raise ValueError(
                    f"{{{role}}}`{key}`: the key is not in book/references.bib;"
                    " add the entry or correct the key"
                )
            entry = self.references.entries[key]
            names = [
                " ".join(person.prelast_names + person.last_names)
                for person in entry.persons["author"]
            ]
            authors = [str(Text.from_latex(name)) for name in names]
            label = (
                f"{authors[0]} et al." if len(authors) > 2 else " and ".join(authors)
            )
            year = entry.fields["year"]
            label += f" ({year})" if role.startswith("cite:t") else f", {year}"
            address = entry.fields.get("url") or (
                f"https://doi.org/{entry.fields['doi']}"
                if "doi" in entry.fields
                else ""
            )
            citations.append(f"[{label}]({address})" if address else label)
        if role.startswith("cite:t"):
            return ", ".join(citations)
        return f"({'; '.join(citations)})"

    def _links(self, text: str) -> str:
        parts = re.split(r"((`+)(?!`).+?(?<!`)\2(?!`))", text, flags=re.S)
        # re.split also returns the inner group (the backticks): text, code, backticks,
        # text, and so on.
        return "".join(
            LINK.sub(self._link, part) if index % 3 == 0 else part
            for index, part in enumerate(parts)
            if index % 3 != 2
        )

    def _link(self, match: re.Match) -> str:
        text, target = match["text"], match["target"]
        if re.match(r"[a-z]+:|#", target):
            return f"{match['image']}[{text}]({target})"
        if match["image"]:
            return f"![{text}]({self._picture(target)})"
        path, _, anchor = target.partition("#")
        if not self.pages:
            return text if path in self.titled else f"{text} ({self._title(path)})"
        page = (self.folder / path).resolve().relative_to(self.root.resolve())
        address = f"{self.pages}/{page.with_suffix('.html').as_posix()}"
        return f"[{text}]({address}#{anchor})" if anchor else f"[{text}]({address})"

    def _title(self, path: str) -> str:
        self.titled.add(path)
        source = self._file(path).read_text(encoding="utf-8")
        if path.endswith(".ipynb"):
            source = "".join(json.loads(source)["cells"][0]["source"])
        return f"*{re.search('^# (.+)$', source, re.M)[1]}*"

    def _picture(self, target: str) -> str:
        if re.match(r"[a-z]+:", target):
            return target
        kind = mimetypes.guess_type(target)[0]
        content = base64.b64encode(self._file(target).read_bytes()).decode()
        return f"data:{kind};base64,{content}"

    def _included(self, target: str, options: dict[str, str]) -> str:
        source = self._file(target).read_text(encoding="utf-8")
        name = options.get("pyobject")
        if not name:
            return source.rstrip()
        nodes = ast.parse(source).body
        for part in name.split("."):
            node = next(
                (node for node in nodes if getattr(node, "name", None) == part), None
            )
            if node is None:
                raise ValueError(
                    f"{target} defines no {name};"
                    " expected the name of a function or class in it"
                )
            nodes = node.body
        first = min(
            [node.lineno, *(decorator.lineno for decorator in node.decorator_list)]
        )
        return "\n".join(source.splitlines()[first - 1 : node.end_lineno])

    def _file(self, target: str) -> Path:
        # As in Sphinx, a leading slash is the root of the book's sources.
        path = (
            self.root / target[1:] if target.startswith("/") else self.folder / target
        )
        if not path.is_file():
            raise ValueError(
                f"{target} does not exist (relative to {self.folder.name}/);"
                " correct the path in the notebook"
            )
        return path


def _closing(lines: list[str], start: int, marks: str) -> int:
    """Find the line that closes a fence: at least as many of the same marks."""
    for position in range(start + 1, len(lines)):
        line = lines[position].strip()
        if set(line) == {marks[0]} and len(line) >= len(marks):
            return position
    raise ValueError(
        f"the fence {lines[start]!r} is not closed; end it with a line {marks}"
    )


def _options(body: list[str]) -> tuple[dict[str, str], list[str]]:
    """Split a directive's body into its `:key: value` lines and the rest."""
    count = next(
        (i for i, line in enumerate(body) if not OPTION.match(line)), len(body)
    )
    options = {match[1]: match[2].strip() for match in map(OPTION.match, body[:count])}
    return options, body[count:]
