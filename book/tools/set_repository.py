"""Fill in the public repository's address, so that a published book's buttons lead to
the copy it was published with.

    python book/tools/set_repository.py OWNER/NAME

The workflow calls this before it builds, so a fork's buttons work unedited. The
committed _config.yml names none.
"""

import re
import sys
from pathlib import Path

CONFIG = Path(__file__).resolve().parents[2] / "_config.yml"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*/[A-Za-z0-9_.-]+")
LINE = re.compile(r'^(repository:\n(?:  .*\n)*?  url: )"[^"\n]*"$', re.M)


def with_repository(config: str, repository: str) -> str:
    """Return the text of _config.yml with `repository.url` set; everything else,
    comments included, stays.

    Args:
        config: the text of _config.yml.
        repository: OWNER/NAME on GitHub.

    Raises:
        ValueError: if `repository` has another form, or the text has no `url: "…"`
            under `repository:`.
    """
    if not NAME.fullmatch(repository):
        raise ValueError(
            f"repository {repository!r}; expected OWNER/NAME, as GitHub Actions gives"
            " it in github.repository"
        )
    changed, count = LINE.subn(rf'\1"https://github.com/{repository}"', config)
    if count != 1:
        raise ValueError(
            f'_config.yml has {count} lines `url: "…"` under `repository:`; expected'
            " one. Restore that line"
        )
    return changed


def main(arguments: list[str], config: Path = CONFIG) -> int:
    """Run the command line; return its exit status."""
    if len(arguments) != 1:
        print("usage: set_repository.py OWNER/NAME", file=sys.stderr)
        return 2
    try:
        text = with_repository(config.read_text(encoding="utf-8"), arguments[0])
        config.write_text(text, encoding="utf-8")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
