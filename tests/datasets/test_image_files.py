import io
import struct
import zlib

import cv2
import numpy as np
import pytest
import skimage.color
from PIL import Image
from refusals import refuses
from skimage import data

from paperlib.datasets import read_image, read_mask
from paperlib.datasets.image_files import (
    list_image_files,
    natural_sort_key,
    raise_problems,
)

CAT = np.ascontiguousarray(data.chelsea()[60:180:2, 100:260:2])  # 60×80, RGB


def by_cv2(path, flags=cv2.IMREAD_COLOR):
    return cv2.cvtColor(cv2.imread(str(path), flags), cv2.COLOR_BGR2RGB)


def pixels(path):
    picture = read_image(path)
    assert picture.mode == "RGB"
    return np.asarray(picture).astype(int)


def rgb_png(path):
    Image.fromarray(CAT).save(path)
    return CAT


def grey(path):
    Image.fromarray(CAT[..., 1]).save(path)
    return np.repeat(CAT[..., 1:2], 3, -1)


def bilevel(path):
    Image.fromarray(CAT[..., 0] > 128).save(path)
    return np.repeat(255 * (CAT[..., :1] > 128), 3, -1)


def palette(path):
    Image.fromarray(CAT).quantize(16).save(path)
    return by_cv2(path)


def sixteen_bit_grey(path):
    values = CAT[..., 0].astype(np.uint16) * 256 + CAT[..., 1]
    cv2.imwrite(str(path), values)
    return np.repeat(values[..., None] / 257, 3, -1)


def sixteen_bit_rgb(path):
    values = CAT.astype(np.uint16) * 256 + 200
    cv2.imwrite(str(path), values[..., ::-1])
    return values / 257


def transparent(path):
    alpha = (
        np.linspace(0, 255, CAT[..., 0].size).astype(np.uint8).reshape(CAT.shape[:2])
    )
    Image.fromarray(np.dstack([CAT, alpha])).save(path)
    return 255 * skimage.color.rgba2rgb(np.dstack([CAT, alpha]))  # on white


def transparent_grey(path):
    alpha = (
        np.linspace(0, 255, CAT[..., 0].size).astype(np.uint8).reshape(CAT.shape[:2])
    )
    Image.fromarray(np.dstack([CAT[..., 0], alpha]), "LA").save(path)
    return 255 * skimage.color.rgba2rgb(np.dstack([CAT[..., 0]] * 3 + [alpha]))


def transparent_palette(path):
    picture = Image.fromarray(CAT).quantize(16)
    picture.save(path, transparency=0)
    colours = np.array(picture.getpalette()).reshape(-1, 3)
    indices = np.asarray(picture)
    colours[0] = 255
    return colours[indices]


def transparent_colour(path):
    Image.fromarray(CAT).save(path, transparency=tuple(int(v) for v in CAT[5, 6]))
    return np.where((CAT == CAT[5, 6]).all(-1, keepdims=True), 255, CAT)


def tiff_of_cmyk(path):
    cmyk = np.dstack([CAT, CAT[::-1, ::-1, 0] // 3])
    Image.fromarray(cmyk, "CMYK").save(path)
    return (255.0 - cmyk[..., :3]) * (255.0 - cmyk[..., 3:]) / 255


KINDS = {
    ".png": [
        rgb_png,
        grey,
        bilevel,
        palette,
        sixteen_bit_grey,
        sixteen_bit_rgb,
        transparent,
        transparent_grey,
        transparent_palette,
        transparent_colour,
    ],
    ".tif": [
        rgb_png,
        grey,
        bilevel,
        palette,
        sixteen_bit_grey,
        transparent,
        tiff_of_cmyk,
    ],
    ".bmp": [rgb_png, grey, bilevel, palette],
    ".ppm": [rgb_png, grey],
}


@pytest.mark.parametrize(
    ("ending", "write"),
    [(ending, write) for ending, kinds in KINDS.items() for write in kinds],
)
def test_every_kind_of_file_reads_as_independent_readers_do(tmp_path, ending, write):
    path = tmp_path / f"picture{ending}"
    expected = write(path)
    assert np.abs(pixels(path) - expected).max() <= 1
    assert np.ptp(pixels(path)) > 100


@pytest.mark.parametrize("ending", [".jpg", ".webp"])
def test_lossy_files_read_as_opencv_reads_them(tmp_path, ending):
    path = tmp_path / f"picture{ending}"
    Image.fromarray(CAT).save(path, quality=90)
    # Two decoders round differently.
    assert np.abs(pixels(path) - by_cv2(path)).max() <= 3
    Image.fromarray(CAT[..., 0]).save(path, quality=90)
    assert np.abs(pixels(path) - by_cv2(path)).max() <= 3


def test_a_jpeg_of_cmyk_reads_as_opencv_reads_it(tmp_path):
    path = tmp_path / "picture.jpg"
    Image.fromarray(CAT).convert("CMYK").save(path, quality=95)
    assert Image.open(path).mode == "CMYK"
    assert np.abs(pixels(path) - by_cv2(path)).max() <= 3
    assert np.abs(pixels(path) - CAT).mean() < 6  # and as the picture was: not inverted


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_their_exif_says(tmp_path, orientation):
    path = tmp_path / "picture.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(CAT).save(path, quality=95, exif=exif)
    assert np.abs(pixels(path) - by_cv2(path)).max() <= 3  # OpenCV turns them too
    assert pixels(path).shape == ((60, 80, 3) if orientation < 5 else (80, 60, 3))


def test_of_several_frames_the_first_is_taken(tmp_path):
    path = tmp_path / "picture.tif"
    Image.fromarray(CAT).save(
        path, save_all=True, append_images=[Image.fromarray(255 - CAT)]
    )
    assert (pixels(path) == CAT).all()


def test_numbers_of_unknown_range_are_refused(tmp_path):
    Image.fromarray(CAT[..., 0].astype(np.float32)).save(tmp_path / "float.tif")
    with refuses(r"float.tif: it contains floating-point numbers"):
        read_image(tmp_path / "float.tif")
    Image.fromarray(CAT[..., 0].astype(np.int32) * 1000).save(tmp_path / "int.tif")
    with refuses(
        r"int.tif: its values range from \d+ to \d+000; expected 8 or 16 bits",
    ):
        read_image(tmp_path / "int.tif")


def png_with(chunks):
    """A PNG of one grey pixel, built by hand from its chunks."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


DAMAGE = {
    "cut.png": lambda png, jpg: png[: len(png) // 2],
    "cut.jpg": lambda png, jpg: jpg[: len(jpg) // 2],
    "empty.png": lambda png, jpg: b"",
    "text.png": lambda png, jpg: b"this is no picture",
    "bits.png": lambda png, jpg: png[:200] + bytes(200) + png[400:],
    "header.png": lambda png, jpg: png[:20] + b"\xff\xff" + png[22:],
    "nothing.png": lambda png, jpg: png_with(
        [(b"IHDR", struct.pack(">IIBBBBB", 9, 9, 8, 0, 0, 0, 0)), (b"IEND", b"")]
    ),
    "huge.png": lambda png, jpg: png_with(
        [
            (b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)),
            (b"IDAT", zlib.compress(b"")),
            (b"IEND", b""),
        ]
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.filterwarnings("ignore")
def test_damaged_pictures_are_refused_by_name(tmp_path, name):
    files = []
    for kind in ("png", "jpeg"):
        buffer = io.BytesIO()
        Image.fromarray(CAT).save(buffer, kind)
        files.append(buffer.getvalue())
    (tmp_path / name).write_bytes(DAMAGE[name](*files))
    for read in (read_image, read_mask):
        with refuses(rf"{name}: \w+"):
            read(tmp_path / name)


def test_a_missing_picture_is_named(tmp_path):
    with refuses("absent.png: .*No such file"):
        read_image(tmp_path / "absent.png")
    with refuses(r"\w+: \S+"):
        read_image(tmp_path)  # a folder


MARKED = np.zeros((5, 7), bool)
MARKED[1:3, 2:6] = True


@pytest.mark.parametrize(
    "picture",
    [
        Image.fromarray(MARKED.astype(np.uint8) * 255),
        Image.fromarray(MARKED.astype(np.uint8)),  # marks of 1
        Image.fromarray(MARKED),  # one bit
        Image.fromarray(MARKED.astype(np.uint16) * 3),
        Image.fromarray(
            np.dstack(
                [MARKED * np.uint8(0), MARKED * np.uint8(0), MARKED * np.uint8(1)]
            )
        ),
        # opaque.
        Image.fromarray(
            np.dstack(
                [MARKED.astype(np.uint8)] * 3 + [np.full_like(MARKED, 255, np.uint8)]
            )
        ),
        Image.fromarray(
            np.dstack([MARKED.astype(np.uint8), np.full_like(MARKED, 255, np.uint8)]),
            "LA",
        ),
        Image.fromarray(MARKED.astype(np.uint8) * 255).convert("RGB").quantize(2),
    ],
    ids=["255", "1", "bit", "16 bits", "blue", "rgba", "la", "palette"],
)
def test_masks_of_any_kind_are_boolean(tmp_path, picture):
    picture.save(tmp_path / "mask.png")
    mask = read_mask(tmp_path / "mask.png")
    assert mask.dtype == bool and np.array_equal(mask, MARKED)


def test_files_are_in_natural_order(tmp_path):
    names = [
        *"a 1.png 2.PNG 10.jpg a1b.png a1.png b.txt .hidden.png 010.png".split(),
        *"10.png".split(),
    ]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    found = [path.name for path in list_image_files(tmp_path)]
    assert found == "1.png 2.PNG 10.jpg 010.png 10.png a1.png a1b.png".split()
    # Any two names can be compared.
    assert sorted(map(natural_sort_key, tmp_path.iterdir()))


def test_one_error_names_ten_problems():
    raise_problems([], "here")
    with refuses("1 problem in here") as error:
        raise_problems(["a.png: damaged"], "here")
    assert str(error.value).endswith("\n  a.png: damaged")
    with refuses("12 problems in here") as error:
        raise_problems([f"{n}.png: damaged" for n in range(12)], "here")
    lines = str(error.value).splitlines()
    assert len(lines) == 12
    assert lines[10].endswith("9.png: damaged")
    assert lines[11].endswith("… and 2 more")


def test_a_tiff_that_ends_before_its_height_is_refused(tmp_path):
    """One flipped bit of the height: Pillow would leave the rows that are not there
    black, and take their memory.
    """
    path, pixels = tmp_path / "cell.tif", data.astronaut()[:40, :200]
    Image.fromarray(pixels).save(path)
    assert np.array_equal(read_image(path), pixels)
    whole = bytearray(path.read_bytes())
    # The tag ImageLength, one number of 32 bits.
    place = whole.index(struct.pack("<HHII", 257, 4, 1, 40)) + 8
    for height in (41, 40 + (1 << 16)):
        path.write_bytes(whole[:place] + struct.pack("<I", height) + whole[place + 4 :])
        with refuses(
            rf"its header states 200×{height} pixels, its data hold 200×40",
        ):
            read_image(path)
    path.write_bytes(whole[:place] + struct.pack("<I", 39) + whole[place + 4 :])
    # All that it announces is there.
    assert np.array_equal(read_image(path), pixels[:39])
