"""British spelling in pages, notebooks, README and docstrings.

The dictionary is SCOWL's en_GB-ise for hunspell (tests/book/dictionary; npm's
dictionary-en-gb 3.0.0), which has only the -ise spelling of a word; book/words.txt
contains technical terms and names. A word that fails is misspelt, is missing in that
list, or is code and needs backticks.
"""

import ast
import io
import re
import tokenize

import jupytext
import pytest
from built import ROOT
from hunspell import Hunspell

WORDS = ROOT / "book" / "words.txt"
DICTIONARY = Hunspell(
    "en_GB-ise", hunspell_data_dir=str(ROOT / "tests" / "book" / "dictionary")
)
# Generated; it names the processor on which the notebooks were run.
GENERATED = ROOT / "book" / "status.md"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "LICENSE-text.md",
    *sorted({*(ROOT / "book").glob("*.md")} - {GENERATED}),
]
TEXTS = sorted((ROOT / "notebooks" / "py").glob("*.py"))
MODULES = sorted((ROOT / "paperlib").rglob("*.py"))
SHORTEST = 3

# Parts of Markdown and docstrings that are not English, the largest first.
NO_PROSE = re.compile(
    r"""
    ^---\n.*?^---$                              # the head of a page
    | ^[ ]*>>>[ ].*?(?:^[ ]*$|\Z)               # an example, up to an empty line
    | <!--.*?--> | </?[a-zA-Z][^>\n]*>          # HTML
    | \$\$.+?\$\$ | (?<!\\)\$[^$]+?\$           # formulas
    | \{(?:cite|eq|ref|numref|doc|py)[\w:]*\}`[^`]+`
    | ``[^`]+`` | `[^`]+` | "[a-z_]+"           # code; a value such as "centered"
    | (?<=\])\([^)\s]+\) | <?https?://[^\s>)]+ | ^:[\w-]+:[^\n]*$ | ^\([\w:.-]+\)=$
    | ^[ ]*\|[ :|-]+\|$ | \(eq-[\w-]+\)
    | ^[ ]{2,}[a-z_]+(?=:[ ])                   # an argument in a docstring
    | \b\w+(?:[._/]\w+)+                        # names with dots, paths
    """,
    re.X | re.S | re.M,
)
FENCE = re.compile(r"^ *(?P<marks>`{3,}|:{3,})(?:\{(?P<name>[\w-]+)\})?(?P<title>.*)$")
# None: a fence without a directive.
CODE = {None, "code-block", "literalinclude", "math", "eval-rst"}
TERM = re.compile(r"\{term\}`([^<`]+?)(?:\s*<[^>]+>)?`")  # its text is read
# Lite0 and uint8 are names, not words.
WORD = re.compile(r"(?<!\w)[^\W\d_]+(?:['’][^\W\d_]+)*(?!\w)")


@pytest.fixture(scope="module")
def known():
    """Return a function that looks up a word in the dictionary and the list."""
    listed = set(WORDS.read_text(encoding="utf-8").split())

    def check(word):
        word = word.replace("’", "'")
        stem = word.removesuffix("'s").removesuffix("'")
        forms = {word, stem, stem.removesuffix("s")}
        forms |= {form[:1].lower() + form[1:] for form in forms}
        return bool(forms & listed) or DICTIONARY.spell(word) or DICTIONARY.spell(stem)

    return check


def words(text):
    """List the words of the prose in a Markdown text or docstring."""
    candidates = WORD.findall(NO_PROSE.sub(" ", TERM.sub(r"\1", outside_code(text))))
    return [
        word
        for word in candidates
        if len(word) >= SHORTEST and not word.removesuffix("s").isupper()
    ]


def outside_code(text):
    """Remove fenced code; keep the content of other directives."""
    prose, opened = [], []
    for line in text.splitlines():
        fence = FENCE.match(line)
        if opened and line.strip() == opened[-1][0]:
            opened.pop()
        elif fence and not any(name in CODE for _, name in opened):
            opened.append((fence["marks"], fence["name"]))
            prose += [fence["title"]] * (fence["name"] not in CODE)
        elif not any(name in CODE for _, name in opened):
            prose.append(line)
    return "\n".join(prose)


def notebook_text(path):
    """Join a notebook's Markdown, comments, docstrings and alt texts."""
    parts = []
    for cell in jupytext.read(path).cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(cell.metadata.get("mystnb", {}).get("image", {}).get("alt", ""))
        tokens = tokenize.generate_tokens(io.StringIO(cell.source).readline)
        comments = [
            token.string.lstrip("# ")
            for token in tokens
            if token.type == tokenize.COMMENT
        ]
        parts += [comment for comment in comments if not comment.startswith("fmt:")]
        parts += docstrings(cell.source)
    return "\n\n".join(parts)


def docstrings(source):
    """List the docstrings of a module and of everything in it."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef
    return [
        ast.get_docstring(node) or ""
        for node in ast.walk(ast.parse(source))
        if isinstance(node, documented)
    ]


def read(path):
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    return (
        notebook_text(path)
        if path in TEXTS
        else "\n\n".join(docstrings(path.read_text(encoding="utf-8")))
    )


@pytest.mark.parametrize(
    "path",
    [*PAGES, *TEXTS, *MODULES],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_every_word_is_known(path, known):
    unknown = sorted({word for word in words(read(path)) if not known(word)})
    assert unknown == [], (
        "misspelt, missing in book/words.txt, or code without backticks"
    )


def test_the_list_is_sorted_without_duplicates():
    listed = WORDS.read_text(encoding="utf-8").split()
    assert listed == sorted(set(listed), key=lambda word: (word.lower(), word))


def test_the_list_contains_no_word_of_the_dictionary():
    listed = WORDS.read_text(encoding="utf-8").split()
    assert [word for word in listed if DICTIONARY.spell(word)] == []
