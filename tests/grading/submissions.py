"""Notebooks as students hand them in, made from the chapters' own texts."""

import json
import re
from pathlib import Path

from exercise_checks import cells

STUB = re.compile(r"check\.(\w+)\(\.\.\.\)")


def notebook(sources: list[str]) -> str:
    made = [
        {
            "cell_type": "code",
            "source": s,
            "metadata": {},
            "outputs": [],
            "execution_count": None,
        }
        for s in sources
    ]
    return json.dumps(
        {"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 4}
    )


def solved(chapter: str) -> str:
    """The whole chapter, solutions included."""
    return notebook(cells(chapter))


def stub(chapter: str) -> str:
    """What students get: the exercises' cells with their dots."""
    return notebook(cells(chapter, "exercise"))


def answered(
    chapter: str, answers: dict[str, str], before: str = "", after: str = ""
) -> str:
    """The stub with some answers filled in, and cells before and after."""
    filled = [
        STUB.sub(lambda m: f"check.{m[1]}({answers.get(m[1], '...')})", s)
        for s in cells(chapter, "exercise")
    ]
    return notebook([source for source in (before, *filled, after) if source])


def hand_in(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder
