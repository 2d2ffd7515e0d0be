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
from paperlib.image_files import (
    check_depth,
    list_image_files,
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


def test_a_lack_of_memory_does_not_make_a_file_unusable(tmp_path, monkeypatch):
    def run_out(image):
        raise MemoryError

    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "load", run_out)
    with pytest.raises(MemoryError):
        read_image(tmp_path / "a.png")


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


# ---- masks that are soft or transparent ----

DISC = (np.mgrid[:64, :64] - 30) ** 2
DISC = DISC.sum(0) < 400


def antialiased(dtype, white):
    """The disc, drawn four times as large and averaged."""
    large = Image.fromarray(DISC.astype(np.float32)).resize((256, 256), 0)
    soft = np.asarray(large.resize((64, 64), Image.Resampling.BICUBIC)).clip(0, 1)
    return Image.fromarray((soft * white).astype(dtype))


@pytest.mark.parametrize("quality", [30, 60, 90])
def test_lossy_masks_are_read_as_they_were_drawn(tmp_path, quality):
    for name in ("mask.jpg", "mask.webp"):
        Image.fromarray(DISC * np.uint8(255)).save(tmp_path / name, quality=quality)
        marked = read_mask(tmp_path / name)
        assert np.count_nonzero(marked != DISC) <= 0.01 * DISC.sum()


@pytest.mark.parametrize(
    ("dtype", "white"),
    [(np.uint8, 255), (np.uint8, 100), (np.uint16, 65535), (np.float32, 1)],
)
def test_soft_masks_are_cut_at_half_of_their_maximum(tmp_path, dtype, white):
    antialiased(dtype, white).save(tmp_path / "mask.tif")
    assert np.array_equal(read_mask(tmp_path / "mask.tif"), DISC)


@pytest.mark.parametrize("colour", [0, 90, 255])
def test_transparency_alone_is_a_mask(tmp_path, colour):
    plain, alpha = np.full(DISC.shape, colour, np.uint8), DISC * np.uint8(255)
    Image.fromarray(np.dstack([plain] * 3 + [alpha])).save(tmp_path / "rgba.png")
    Image.fromarray(np.dstack([plain, alpha]), "LA").save(tmp_path / "la.png")
    palette = Image.fromarray(DISC.astype(np.uint8), "P")
    palette.putpalette([colour] * 6)
    palette.save(tmp_path / "palette.png", transparency=0)
    for name in ("rgba", "la", "palette"):
        assert np.array_equal(read_mask(tmp_path / f"{name}.png"), DISC)


def test_what_is_painted_on_a_transparent_layer_is_marked(tmp_path):
    white = np.full((64, 64, 4), 255, np.uint8)
    white[..., 3] = 0
    white[DISC] = (200, 0, 0, 255)
    Image.fromarray(white).save(tmp_path / "mask.png")
    assert np.array_equal(read_mask(tmp_path / "mask.png"), DISC)
    white[DISC] = (0, 0, 0, 255)
    Image.fromarray(white).save(tmp_path / "black.png")
    with refuses("black.png: its colours and its transparency mark different pixels"):
        read_mask(tmp_path / "black.png")


@pytest.mark.parametrize("labels", [(0, 1, 2), (0, 3, 9)])
def test_labels_of_classes_are_no_soft_mask(tmp_path, labels):
    values = np.resize(np.array(labels, np.uint8), (6, 6))
    for dtype in (np.uint8, np.uint16):
        Image.fromarray(values.astype(dtype)).save(tmp_path / "mask.png")
        with refuses("mask.png: its values are 0, .*, labels of classes"):
            read_mask(tmp_path / "mask.png")


# ---- 10 to 14 bits in files of 16 ----


def camera(bits, colour=False):
    """A ramp over all values of a camera, and the same in 8 bits."""
    values = np.linspace(0, 2**bits - 1, 64 * 64).round().astype(np.uint16)
    values = values.reshape(64, 64)
    if colour:
        values = np.dstack([values, values[::-1], values.T])
    return values, (values / (2**bits - 1) * 255).round()


@pytest.mark.parametrize("bits", [8, 10, 11, 12, 14, 16])
@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_white_is_the_highest_value_of_the_depth(tmp_path, bits, ending):
    values, expected = camera(bits)
    path = tmp_path / f"image.{ending}"
    cv2.imwrite(str(path), values)
    found = np.asarray(read_image(path, bits))
    assert (found == expected[..., None]).all()
    assert len(np.unique(found)) == 256
    if bits > 8:
        with refuses(rf"image.{ending}: its values range .* expected bits={bits - 1}"):
            read_image(path, bits - 1)


@pytest.mark.parametrize(("bits", "factor"), [(10, 64), (12, 16), (14, 4)])
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_colours_of_16_bits_have_to_be_scaled_before(tmp_path, bits, factor, ending):
    values, expected = camera(bits, colour=True)
    path = str(tmp_path / f"image.{ending}")
    cv2.imwrite(path, values[..., ::-1])
    with refuses(f"bits={bits} of 16-bit colours, .* multiply the values by {factor} "):
        read_image(path, bits)
    cv2.imwrite(path, values[..., ::-1] * np.uint16(factor))
    assert np.abs(np.asarray(read_image(path, 16)) - expected).max() <= 1


def test_the_depth_concerns_files_of_16_bits_only(tmp_path):
    rgb_png(tmp_path / "8.png")
    assert np.array_equal(read_image(tmp_path / "8.png", 12), CAT)
    stated = np.arange(0, 4096, 256, dtype=">u2")
    (tmp_path / "12.pgm").write_bytes(b"P5 4 4 4095\n" + stated.tobytes())
    for bits in (None, 10):
        found = np.asarray(read_image(tmp_path / "12.pgm", bits))[..., 0]
        assert np.abs(found.ravel() - stated / 4095 * 255).max() <= 0.51
    for bits in (7, 17, 12.5, "12"):
        with refuses("bits=.* expected 8 to 16, or None"):
            read_image(tmp_path / "8.png", bits)


@pytest.mark.parametrize(("bits", "likely"), [(8, 8), (9, 10), (10, 10), (13, 14)])
@pytest.mark.parametrize("colour", [False, True])
def test_a_folder_that_leaves_the_top_bits_empty_is_refused(
    tmp_path, bits, likely, colour
):
    values, _ = camera(bits, colour)
    paths = [tmp_path / f"{n}.png" for n in range(3)]
    for path in paths[:2]:
        cv2.imwrite(str(path), values)
    check_depth(paths[:1], tmp_path)  # one image does not decide
    with refuses(rf"the 2 images of 16 bits in {tmp_path} have .* Pass bits={likely} "):
        check_depth(paths[:2], tmp_path)
    rgb_png(paths[2])
    with refuses("the 2 images of 16 bits"):  # those of 8 bits do not count
        check_depth(paths, tmp_path)
    bright, _ = camera(16, colour)
    cv2.imwrite(str(paths[2]), bright)
    check_depth(paths, tmp_path)
    paths[2].write_text("corrupt")
    with refuses("the 2 images of 16 bits"):
        check_depth(paths, tmp_path)
