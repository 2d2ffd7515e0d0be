"""Addresses of a copy of the book that GitHub publishes."""

import re

# Where .github/workflows/book.yml publishes the built book, Colab copies included.
BRANCH = "gh-pages"
FOLDER = "colab"


def _parts(repository: str) -> tuple[str, str] | None:
    match = re.fullmatch(r"https://github\.com/([\w.-]+)/([\w.-]+?)/?", repository)
    return match and (match[1], match[2])


def pages_url(repository: str) -> str:
    """Turn https://github.com/OWNER/NAME into the address of its GitHub Pages; anything
    else into nothing.
    """
    if not (parts := _parts(repository)):
        return ""
    host = f"{parts[0].lower()}.github.io"
    # A repository of this name is published at the root.
    is_root = parts[1].lower() == host
    return f"https://{host}" if is_root else f"https://{host}/{parts[1]}"


def colab_url(repository: str, name: str) -> str:
    """Return the address at which Colab opens the published copy of a notebook; empty
    if the book has no GitHub repository.
    """
    if not (parts := _parts(repository)):
        return ""
    path = f"{'/'.join(parts)}/blob/{BRANCH}/{FOLDER}/{name}.ipynb"
    return f"https://colab.research.google.com/github/{path}"
