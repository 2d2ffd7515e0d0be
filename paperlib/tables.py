"""Align rows of text in columns."""

from collections.abc import Sequence


def align_columns(rows: Sequence[Sequence[str]], sides: str) -> str:
    """Align rows of text in columns, two spaces apart.

    Args:
        rows: one text per column and row.
        sides: per column "<" for left or ">" for right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            f"{cell:{side}{width}}"
            for cell, side, width in zip(row, sides, widths, strict=True)
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
