"""Figures of the notebooks are readable on a phone, where 6.4 inches are 350 pixels."""

import ast
import base64
import io
import json

import pytest
from built import NOTEBOOKS
from PIL import Image

WIDEST = 6.4  # inches
SMALLEST = 11  # points; 8.3 px on the phone
DPI = 110  # of `viz.use_style`


def constants(node: ast.expr) -> list[float]:
    return [
        part.value
        for part in ast.walk(node)
        if isinstance(part, ast.Constant) and isinstance(part.value, (int, float))
    ]


def faults(source: str) -> list[str]:
    """List wide figures, small text and changes of the resolution in a cell."""
    messages = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword):
            if (
                node.arg == "figsize"
                and isinstance(node.value, ast.Tuple)
                and max(constants(node.value.elts[0]), default=0) > WIDEST
            ):
                messages.append(
                    f"figsize {ast.unparse(node.value)}: wider than {WIDEST} inches"
                )
            if (
                node.arg in ("fontsize", "labelsize")
                and min(constants(node.value), default=SMALLEST) < SMALLEST
            ):
                messages.append(
                    f"{node.arg}={ast.unparse(node.value)}: under {SMALLEST} points"
                )
        if isinstance(node, ast.Constant) and node.value == "figure.dpi":
            messages.append("figure.dpi: set by the style for all figures")
    return messages


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_figures_are_readable_on_a_phone(path):
    cells = [
        cell
        for cell in json.loads(path.read_text())["cells"]
        if cell["cell_type"] == "code"
    ]
    assert [
        fault
        for cell in cells
        for fault in faults(
            "".join(line for line in cell["source"] if line[0] not in "%!")
        )
    ] == []
    for cell in cells:
        for output in cell["outputs"]:
            for kind, data in output.get("data", {}).items():
                if kind in ("image/png", "image/jpeg"):
                    width = Image.open(
                        io.BytesIO(base64.b64decode("".join(data)))
                    ).width
                    assert width <= 1.1 * WIDEST * DPI, "".join(cell["source"])[:200]
