"""Fill in the repository's address, so that the links of a published copy lead to it.

    python3 book/tools/set_repository.py OWNER/NAME

It sets `repository.url` and the button "Repository" in _config.yml, from which the
book's Colab buttons follow; the address to clone and to install from in README.md and
book/running.md; and the links to the published book in README.md. A second call
replaces the name of the first. Needs no package.
"""

import os
import re
import sys
from pathlib import Path

from addresses import colab_url, pages_url

ROOT = Path(__file__).resolve().parents[2]
CONFIG, README, RUNNING = "_config.yml", "README.md", "book/running.md"
PLACEHOLDER = "<address of this repository>"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*/[A-Za-z0-9_.-]+")
URL = re.compile(r'^(repository:\n(?:  .*\n)*?  url: )"([^"\n]*)"$', re.M)
BUTTON = re.compile(r"^(  use_repository_button: )\w+$", re.M)
PUBLISHED = re.compile(r"^.*<!-- published -->$", re.M)


def _replace(pattern: re.Pattern, replacement: str, text: str, what: str) -> str:
    changed, count = pattern.subn(replacement, text)
    if count != 1:
        raise ValueError(f"found {count} lines {what}; expected one. Restore that line")
    return changed


def with_repository(config: str, repository: str) -> str:
    """Return the text of _config.yml with `repository.url` and the button "Repository"
    set; everything else, comments included, is unchanged.

    Args:
        config: the text of _config.yml.
        repository: OWNER/NAME on GitHub.

    Raises:
        ValueError: if `repository` has another form, or a line to set is missing.
    """
    if not NAME.fullmatch(repository):
        raise ValueError(
            f"repository {repository!r}; expected OWNER/NAME, as GitHub Actions gives"
            " it in github.repository"
        )
    address = rf'\1"https://github.com/{repository}"'
    config = _replace(URL, address, config, '`url: "…"` under `repository:`')
    return _replace(BUTTON, r"\1true", config, "`use_repository_button:`")


def with_published_links(readme: str, address: str, notebooks: list[str]) -> str:
    """Return README with the line of links to the published book."""
    chapters = " · ".join(
        f"[{name[:2].lstrip('0')}]({colab_url(address, name)})" for name in notebooks
    )
    line = f"**Read it** at <{pages_url(address)}/>, or open a chapter on Colab:"
    line += f" {chapters} <!-- published -->"
    return _replace(PUBLISHED, line, readme, "`<!-- published -->`")


def fill(root: Path, repository: str) -> dict[Path, str]:
    """Return the new text of each file, without writing it.

    Raises:
        ValueError: as `with_repository`.
    """
    names = (CONFIG, README, RUNNING)
    texts = {name: (root / name).read_text(encoding="utf-8") for name in names}
    set_before = URL.search(texts[CONFIG])
    previous = set_before[2] if set_before and set_before[2] else PLACEHOLDER
    texts[CONFIG] = with_repository(texts[CONFIG], repository)
    address = f"https://github.com/{repository}"
    notebooks = sorted(path.stem for path in (root / "notebooks").glob("*.ipynb"))
    texts[README] = with_published_links(texts[README], address, notebooks)
    for name in (README, RUNNING):
        pattern = re.compile(re.escape(previous) + r"(?![\w./-])")
        texts[name] = pattern.sub(address, texts[name])
    return {root / name: text for name, text in texts.items()}


def main(arguments: list[str], root: Path = ROOT) -> int:
    """Run the command line; return its exit status."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: set_repository.py OWNER/NAME", file=sys.stderr)
        return 2
    try:
        for path, text in fill(root, arguments[0]).items():
            temporary = path.with_name(f"{path.name}.tmp")
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
