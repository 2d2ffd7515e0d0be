"""Make a notebook's pictures lighter than matplotlib writes them, without a difference
that an eye can see.
"""

import base64
import io
import re

import numpy as np
from nbformat import NotebookNode
from PIL import Image
from status import COMPARED

# Errors in steps of 256: what 256 colours in place of all may change on average, and in
# all but one of 1,000 values.
MEAN_ERROR, HIGH_ERROR = 0.25, 10
JPEG_QUALITY = 84
INLINE = re.compile(r"data:image/png;base64,([A-Za-z0-9+/]+=*)")


def lighten(png: bytes) -> tuple[str, bytes]:
    """Encode a picture anew: a plot as PNG with 256 colours, one that shows photographs
    as JPEG.

    Returns:
        the media type and the bytes; those that came where nothing is gained or the
        picture is transparent somewhere.
    """
    picture = Image.open(io.BytesIO(png))
    if picture.mode == "RGBA" and picture.getextrema()[3] != (255, 255):
        return "image/png", png
    picture = picture.convert("RGB")
    few = picture.quantize(
        256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE
    )
    error = np.abs(
        np.asarray(few.convert("RGB"), dtype=int) - np.asarray(picture, dtype=int)
    )
    buffer = io.BytesIO()
    if error.mean() <= MEAN_ERROR and np.quantile(error, 0.999) <= HIGH_ERROR:
        few.save(buffer, "PNG", optimize=True)
        kind = "image/png"
    else:
        # Without subsampling, so that thin coloured lines and letters stay sharp.
        picture.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0, optimize=True)
        kind = "image/jpeg"
    return (kind, buffer.getvalue()) if buffer.tell() < len(png) else ("image/png", png)


def lighten_outputs(notebook: NotebookNode) -> None:
    """Encode every PNG in a notebook's outputs anew; those inside HTML too, unless
    `make test` compares it.
    """
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                kind, light = lighten(base64.b64decode(data.pop("image/png")))
                data[kind] = base64.b64encode(light).decode()
            if "text/html" in data and COMPARED not in cell.metadata.get("tags", ()):
                data["text/html"] = INLINE.sub(_lighten_inline, data["text/html"])


def _lighten_inline(match: re.Match) -> str:
    kind, light = lighten(base64.b64decode(match[1]))
    return f"data:{kind};base64,{base64.b64encode(light).decode()}"
