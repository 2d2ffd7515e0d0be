"""Find wordings that the project replaces by the usual words of the field.

    python book/tools/wording.py            every file that is not on the list
    python book/tools/wording.py FILE ...   these files, on the list or not

The list, book/tools/wording_todo.txt, names the files that were written before this
check. It only shrinks: a listed file without a finding has to leave it.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
TODO = Path("book/tools/wording_todo.txt")
KINDS = {".md", ".py", ".yml"}
# This file and its test hold the wordings that are looked for.
LEFT_OUT = {"book/tools/wording.py", "tests/book/test_wording.py"}

UNITS = (
    "axis|batch|cell|channel|chapter|class|epoch|file|image|layer|map|notebook|number|"
    "patch|picture|pixel|position|row|second|seed|step|vector"
)
NOUN = r"(?!(?:and|as|at|by|for|from|has|in|is|of|on|or|than|to|with)\b)[a-z-]+"
# Pattern → what to write. A space stands for any white space, a line break included.
PATTERNS = {
    rf"\b(?:one|two|three|four|\d+|seconds|bytes) (?:{NOUN} )?an? (?:{UNITS})\b": (
        'use "per": "one score per image"'
    ),
    rf"\ba {NOUN} an? (?:{UNITS})\b": 'use "per": "a row per class"',
    r", say\b(?= ?[,.;:)]|$)": '"for example"',
    r"\bthe review's way\b": '"the common implementation"',
    r"\bthe usual way\b": '"the common implementation"',
    r"\bso the idea\b": "a plain sentence",
    r"\bmend(?:s|ed|ing)?\b": '"fix"',
    r"\b(?:put|puts|putting) (?:\w+ )?back\b": '"restore"',
    r"\b(?:go|goes|going|went) on (?:where|from)\b": '"resume"',
    r"\bwhole or not at all\b": '"atomically"',
    r"\bcut off from (?:the|any) graph\b": '"detached"',
    r"\bspeaks? (?:for|against) (?:the|a) (?:class|score)\b": (
        '"increases" or "decreases" the class score'
    ),
    r"\bhidden numbers?\b": '"hidden unit"',
    r"\b(?:layers? with|still has|have no|has no) places\b": '"spatial positions"',
    r"\bparts the colours\b": '"chromatic aberration"',
    r"\bfarthest one, again and again\b": '"farthest-point sampling"',
    r"\bhow heavy\b": '"size"',
    r"\b(?:was|were|is|are) not at hand\b": '"was not available"',
    r"\bno \w+ was at hand\b": '"was not available"',
    r"\b(?:rightly|wrongly) ordered\b": '"ranked correctly", "ranked incorrectly"',
    r"\borders .{0,60}\brightly\b": '"ranks correctly"',
    r"\bstretches nothing\b": '"already has the broadcast shape"',
    r"\bthe two go together\b": '"are correlated"',
}


class Finding(NamedTuple):
    """A wording in a file: its line, the words, and what to write instead."""

    line: int
    words: str
    instead: str


def find(text: str) -> Iterator[Finding]:
    """Yield the findings in a text; a `#` at the start of a line is skipped."""
    for pattern, instead in PATTERNS.items():
        broken_across_lines = pattern.replace(" ", r"(?:\s+(?:#\s+)?)")
        for match in re.finditer(broken_across_lines, text, re.IGNORECASE):
            words = re.sub(r"\s+(?:#\s+)?", " ", match[0])
            yield Finding(text.count("\n", 0, match.start()) + 1, words, instead)


def files(root: Path) -> list[str]:
    """List the files that are checked, relative to `root`: those that git knows."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(
        command, cwd=root, capture_output=True, text=True, check=True
    )
    names = (name for name in listed.stdout.splitlines() if Path(name).suffix in KINDS)
    return sorted(
        name for name in names if name not in LEFT_OUT and (root / name).is_file()
    )


def read_todo(root: Path) -> set[str]:
    """Read the list of files that are not yet in the new style."""
    lines = (root / TODO).read_text(encoding="utf-8").splitlines()
    return {line for line in lines if line and not line.startswith("#")}


def check(root: Path) -> list[str]:
    """Return what is wrong: findings in unlisted files, and names to be taken off."""
    todo = read_todo(root)
    problems = [
        f"{TODO}: {name} does not exist" for name in sorted(todo - {*files(root)})
    ]
    for name in files(root):
        findings = list(find((root / name).read_text(encoding="utf-8")))
        if name in todo and not findings:
            problems.append(
                f"{TODO}: {name} has no finding any more; take it off the list"
            )
        if name not in todo:
            problems += [_line(name, finding) for finding in findings]
    return problems


def _line(name: str, finding: Finding) -> str:
    return f'{name}:{finding.line}: "{finding.words}"; write {finding.instead}'


def main(arguments: list[str]) -> int:
    """Run the command line; return its exit status."""
    if arguments:
        texts = {name: Path(name).read_text(encoding="utf-8") for name in arguments}
        problems = [
            _line(name, found) for name, text in texts.items() for found in find(text)
        ]
    else:
        problems = check(ROOT)
    print("\n".join(problems), end="\n" if problems else "")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
