"""Real-world image folders are read as by an independent reader, or refused by name."""

import io
import os
import re

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refuses

from paperlib.datasets import batches, folder, read_image, read_mask

NOISE = np.random.default_rng(0).integers(0, 256, (48, 36, 3), dtype=np.uint8)


def by_cv2(path):
    """OpenCV's reading: BGR or grey, EXIF applied; its decoders are not Pillow's."""
    data = np.frombuffer(path.read_bytes(), np.uint8)
    return cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def png(array) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


NAMES = [
    "zelle é.png",
    "细胞.png",
    "ячейка.PNG",
    "a b\tc.png",
    "emoji 🙂.png",
    "-rf.png",
    "%20.png",
    "semi;colon.png",
    "quote'\".png",
    "new\nline.png",
    "x" * 200 + ".png",
    "two.dots.png",
    "é.png",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_any_kind(tmp_path, cases, name):
    path = tmp_path / name
    path.write_bytes(png(NOISE))
    assert (np.asarray(read_image(path)) == by_cv2(path)).all()
    data = folder(tmp_path, size=16)
    assert len(data) == 1 and data[0].path == str(path)
    (tmp_path / "bad").mkdir()
    bad = tmp_path / "bad" / name
    bad.write_bytes(b"text")
    with refuses("cannot identify image file") as error:
        folder(tmp_path / "bad", size=16)[0]
    assert str(bad) in str(error.value)
    cases("images: names").survive(2)


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 3000), (3000, 1), (1, 60_000), (20_000, 3), (2, 2)]
)
@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "bmp"])
def test_sides_of_any_length(tmp_path, cases, size, ending):
    path = tmp_path / f"picture.{ending}"
    pixels = np.resize(NOISE, (*size, 3))
    Image.fromarray(pixels).save(path)
    read = np.asarray(read_image(path)).astype(int)
    assert np.abs(read - by_cv2(path)).max() <= 3 and read.shape == (*size, 3)
    item = folder(tmp_path, size=24)[0]
    assert item.image.shape == (3, 24, 24)
    assert 0 <= float(item.image.min()) <= float(item.image.max()) <= 1
    if ending != "jpg":
        assert abs(float(item.image.mean()) - pixels.mean() / 255) < 0.25
        assert read_mask(path).shape == size
    cases("images: sizes").survive()


def test_links_are_followed_and_broken_ones_left_out(tmp_path, cases):
    real = tmp_path / "real"
    real.mkdir()
    (real / "a.png").write_bytes(png(NOISE))
    root = tmp_path / "root"
    root.mkdir()
    (root / "link.png").symlink_to(real / "a.png")
    os.link(real / "a.png", root / "hard.png")
    (root / "broken.png").symlink_to(real / "absent.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "folder.png").mkdir()
    (root / "fifo").mkdir()
    os.mkfifo(root / "pipe.png")  # reading it would wait for ever
    (root / "folder.png").rmdir()
    (root / "fifo").rmdir()
    data = folder(root, size=16)
    assert [
        os.path.basename(item.path) for item in (data[n] for n in range(len(data)))
    ] == ["hard.png", "link.png"]
    assert torch.equal(data[0].image, data[1].image)
    cases("images: links and other files").survive(5)


def bad_files():
    whole = png(NOISE)
    return {
        "zero.png": b"",
        "text.png": b"no picture at all",
        "cut.png": whole[: len(whole) // 2],
        "html.jpg": b"<html>",
        "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "head.png": whole[:8],
        "flipped.png": whole[:300] + bytes([whole[300] ^ 255]) + whole[301:],
        "archive.png": b"PK\x03\x04" + bytes(60),
        "svg.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "zeros.jpg": bytes(5000),
        "nul.tif": b"II*\0" + bytes(4),
    }


def test_unreadable_files_are_named(tmp_path, cases):
    """Each is named when it is read; other kinds of files are no images and are
    skipped.
    """
    bad = bad_files()
    for number in range(5):
        (tmp_path / f"good{number}.png").write_bytes(png(NOISE))
    for name in ("notes.txt", "Thumbs.db", ".hidden.png", ".DS_Store", "list.csv"):
        (tmp_path / name).write_bytes(b"something else")
    assert len(folder(tmp_path, size=16)) == 5
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    data = folder(tmp_path, size=16)
    assert len(data) == 5 + len(bad)
    named = set()
    for number in range(len(data)):
        try:
            data[number]
        except ValueError as error:
            named.add(re.search(r"/([^/]+): ", str(error))[1])
        cases("images: damaged").survive()
    assert named == set(bad)
    with refuses(": "):
        list(batches(data))


MODES = "1 L LA P RGB RGBA CMYK YCbCr I;16 I F LAB HSV".split()
ENDINGS = ["png", "jpg", "tif", "gif", "bmp", "webp", "ppm", "pgm"]


def write(path, mode) -> bool:
    """Write the noise in a mode; return whether Pillow supports it."""
    try:
        if mode == "I;16":
            Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257).save(path)
        else:
            Image.fromarray(NOISE).convert(mode).save(path)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return True


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_mode_in_every_kind_is_read_or_refused_by_name(tmp_path, cases, ending):
    """What Pillow can write is read as 8-bit RGB of the same size, and as OpenCV reads
    it where OpenCV can.
    """
    path, tried = tmp_path / f"picture.{ending}", []
    for mode in MODES:
        if not write(path, mode):
            continue
        tried.append(mode)
        try:
            read = np.asarray(read_image(path)).astype(int)
        except ValueError as error:
            assert path.name in str(error) and mode in ("F", "I", "LAB"), mode
        else:
            assert read.shape == (48, 36, 3), mode
            if mode in ("1", "L", "RGB") and ending != "gif":
                exact = ending in ("png", "bmp", "ppm", "tif", "pgm")
                assert np.abs(read - by_cv2(path)).max() <= (0 if exact else 4), mode
            assert read_mask(path).shape == (48, 36), mode
        cases("images: modes and kinds").survive()
    assert {"L", "RGB"} <= set(tried)
