"""Let autodoc read paperlib's docstrings: Markdown math, code and tables; the fields
Source, Departures, Test.
"""

import re
from typing import NamedTuple

from sphinx.application import Sphinx

# Code comes first, so that a dollar inside it stays a dollar.
INLINE = re.compile(
    r"(?P<code>``[^`]+``|(?<![:`\w])`[^`\n]+`(?!`))|\$\$(?P<block>.+?)\$\$["
    r" ]*|(?<![\\$])\$(?P<math>[^$]+?)\$",
    re.S,
)
TABLE = re.compile(
    r"^(?P<indent>[ ]*)\|.*\n[ ]*\|[ :|-]+\|[ ]*\n(?:[ ]*\|.*(?:\n|\Z))*", re.M
)
# A paragraph of lines `name: meaning`, the way a NamedTuple lists its fields; further
# lines of one are indented.
MEMBERS = re.compile(r"(?:\A|(?<=\n\n))(?:[a-z_]\w*: .*\n(?:[ ]+\S.*\n)*)+(?=\n|\Z)")
FIELDS = re.compile(r"^\s*Source:\s", re.M)
FIELD = re.compile(r"(?:^|\s)(Source|Departures|Test):\s+")


_untouched: dict[str, list[str]] = {}


class _Pair(NamedTuple):
    first: int


def to_rst(text: str) -> str:
    """Return a docstring as reStructuredText: `code`, $math$, $$math$$, tables, and its
    fields as a field list.
    """
    start = FIELDS.search(text)
    body, tail = (text[: start.start()], text[start.start() :]) if start else (text, "")
    _, *parts = FIELD.split(tail)
    fields = [
        f":{name}: {_field(name, ' '.join(value.split()))}"
        for name, value in zip(parts[::2], parts[1::2], strict=True)
    ]
    body = MEMBERS.sub(
        lambda match: re.sub(r"^(?=[a-z_])", ":ivar ", match[0], flags=re.M), body
    )
    return "\n".join([TABLE.sub(_table, _inline(body)).rstrip(), "", *fields, ""])


def _field(name: str, value: str) -> str:
    return (
        re.sub(r"\w+\.py::\w+", r"``\g<0>``", value)
        if name == "Test"
        else _inline(value)
    )


def _inline(text: str) -> str:
    def replace(match: re.Match) -> str:
        if match["code"]:
            return f"``{match['code'].strip('`')}``"
        if match["block"]:
            return _block(text, match)
        # Collapsed white space: a formula may be broken over two lines, a role may not
        # be indented anew.
        role = f":math:`{' '.join(match['math'].split())}`"
        before, after = text[: match.start()][-1:], text[match.end() :][:1]
        return (
            ("\\ " if before.isalnum() else "")
            + role
            + ("\\ " if after.isalnum() else "")
        )

    return INLINE.sub(replace, text)


def _block(text: str, match: re.Match) -> str:
    line = text[: match.start()].rpartition("\n")[2]
    indent = re.match(r"\s*", line)[0]
    formula = [part.strip() for part in match["block"].strip().splitlines()]
    inner = "".join(f"\n{indent}   {part}" for part in formula if part)
    # What follows the formula on its line becomes a paragraph of its own.
    lead = "" if not line.strip() else f"\n\n{indent}"
    return f"{lead}.. math::\n{inner}\n\n{indent}"


def _table(match: re.Match) -> str:
    rows = [
        line.strip().strip("|").split("|") for line in match[0].strip().splitlines()
    ]
    cells = [
        f"{'* -' if column == 0 else '  -'} {cell.strip()}"
        for row in [rows[0], *rows[2:]]
        for column, cell in enumerate(row)
    ]
    lines = [
        ".. list-table::",
        "   :header-rows: 1",
        "",
        *(f"   {cell}" for cell in cells),
    ]
    return "".join(f"\n{match['indent']}{line}" for line in lines) + "\n\n"


# What stands before the first colon of a result would be set as its type; the signature
# gives the type.
_RESULT = re.compile(r"(^ *(?:Returns|Yields):\n +)(?=\S)", re.M)


def _process(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    lines[:] = _RESULT.sub(r"\1: ", to_rst("\n".join(lines))).split("\n")
    if what in ("attribute", "data", "property"):
        _untouched[name] = list(lines)


def _restore(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    # Of these, napoleon takes what stands before a colon in the first line for a type.
    lines[:] = _untouched.pop(name, lines)


def _skip(
    app: Sphinx, what: str, name: str, obj: object, skip: bool, options: object
) -> bool | None:
    # A field of a NamedTuple documents itself as "Alias for field number 0".
    return True if type(obj) is type(_Pair.first) else None


def setup(app: Sphinx) -> dict:
    app.connect("autodoc-skip-member", _skip)
    # Before napoleon reads the sections.
    app.connect("autodoc-process-docstring", _process, priority=400)
    app.connect("autodoc-process-docstring", _restore, priority=600)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
