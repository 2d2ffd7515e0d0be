"""Text for people: aligned columns, and short descriptions of tuples of tensors."""

from collections.abc import Sequence
from typing import Any


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


def short_repr(values: Any) -> str:
    """Describe a NamedTuple with the shapes of its tensors, not their values."""
    fields = (
        f"{name}={tuple(value.shape) if hasattr(value, 'shape') else repr(value)}"
        for name, value in zip(values._fields, values, strict=True)
    )
    return f"{type(values).__name__}({', '.join(fields)})"
