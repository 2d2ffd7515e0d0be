"""Corrupt and hostile files raise a ValueError with their name, without side effects.

No code runs, no memory is allocated, and no file is lost. The fast tests flip bits and
truncate every kind of file at a few places; `make test-long` flips a thousand bits and
truncates at every kilobyte.
"""

import collections
import gzip
import io
import json
import os
import pickle
import random
import resource
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refuses
from safetensors.torch import save
from torch import nn

from paperlib import backbones, storage
from paperlib.backbones import FeatureExtractor
from paperlib.datasets import read_image, read_mask, unpack
from paperlib.padim import PaDiM
from paperlib.padim.evaluation import Result, Settings, read_results, write_results
from paperlib.patch_svdd import HierarchicalEncoder, PatchSVDD, load_released_weights
from paperlib.storage import load_checkpoint, save_checkpoint

# Bytes that reading any of these small files may add to the process.
MEMORY = 300 * 2**20
RECIPE = {"epochs": 5}


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1)
    ).eval()


def trained():
    model = network()
    optimizers = [
        torch.optim.Adam(model[0].parameters()),
        torch.optim.SGD(model[2].parameters(), 0.1, momentum=0.9),
    ]
    model(torch.ones(1, 3, 8, 8)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    return model, optimizers


def encoder():
    torch.manual_seed(0)
    return HierarchicalEncoder(4)


def write_padim(path):
    images = torch.rand(6, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    PaDiM(FeatureExtractor(network(), ["0", "2"]), 7).fit([images]).save(path)


def write_svdd(path):
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    PatchSVDD(encoder(), stride_small=16, stride_big=16).fit(images).save(path)


def write_archive(path):
    rng = random.Random(0)
    content = {
        f"cells/train/good/{n:03}.png": rng.randbytes(3000) + bytes(3000)
        for n in range(3)
    }
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in content.items():
                archive.writestr(name, data)
        return
    with tarfile.open(path, "w:" + path.suffix[1:].replace("tar", "")) as archive:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def write_table(path):
    settings = Settings("cells", "efficientnet_lite0", "default", 100, 0, "centered")
    measures = (5, 6, 0.9, 0.8, 0.7, 3.5, 0.6, 1.5, 2.5)
    write_results(path, [Result(settings, f"kind {n}", *measures) for n in range(20)])


def read_state(path):
    """What `backbones.load` does with a file of weights, for a network small enough to
    be read a thousand times.
    """
    model = network(1)
    backbones._load_in_order(model, backbones._read_state(path), path)
    return model


def write_picture(path):
    """A third smooth, a third noisy, a third flat."""
    rng = np.random.default_rng(0)
    rows = np.linspace(0, 255, 48).astype(np.uint8)
    smooth = np.repeat(np.broadcast_to(rows[:, None], (48, 16))[..., None], 3, 2)
    noisy = rng.integers(0, 256, (48, 16, 3), dtype=np.uint8)
    Image.fromarray(
        np.concatenate([smooth, noisy, np.full((48, 16, 3), 90, np.uint8)], 1)
    ).save(path)


# File → (write, read, whether a checksum detects every change). A changed file without
# a checksum may be read as other content; if not, it raises ValueError and leaves no
# state.
def write_encoder(path):
    encoder().save(path)


def save_pickled(value, path):
    """Save as torch did before 1.6: one pickle, no zip."""
    torch.save(value, path, _use_new_zipfile_serialization=False)


def read_archive(path):
    return unpack(path, path.parent / "unpacked")


def read_picture(path):
    return read_image(path), read_mask(path)


KINDS = {
    "padim.safetensors": (
        write_padim,
        lambda p: PaDiM.load(p, FeatureExtractor(network(), ["0", "2"])),
        True,
    ),
    "svdd.safetensors": (write_svdd, PatchSVDD.load, True),
    "encoder.safetensors": (write_encoder, HierarchicalEncoder.load, True),
    "run.safetensors": (
        lambda p: save_checkpoint(p, *trained(), RECIPE, {"done": 3}),
        lambda p: load_checkpoint(p, *trained(), RECIPE),
        True,
    ),
    "released.pkl": (
        lambda p: save_pickled(collections.OrderedDict(encoder().state_dict()), p),
        load_released_weights,
        False,
    ),
    "weights.pth": (lambda p: torch.save(network().state_dict(), p), read_state, False),
    "old.pth": (lambda p: save_pickled(network().state_dict(), p), read_state, False),
    "results.csv": (write_table, read_results, False),
    **{
        f"cells.{ending}": (write_archive, read_archive, False)
        for ending in ("tar", "tar.gz", "tar.bz2", "tar.xz", "zip")
    },
    **{
        f"cell.{ending}": (write_picture, read_picture, False)
        for ending in ("png", "jpg", "tif", "gif", "bmp", "webp", "ppm")
    },
}


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def leftovers(root: Path, keep: set[str]) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name not in keep)


def try_it(
    path: Path, content: bytes | None, read, must_refuse: bool, what: str
) -> None:
    """Read a file of this content: a ValueError that names it, or a good reading where
    no checksum tells.
    """
    if content is not None:
        path.write_bytes(content)
    before = path.stat().st_size if path.is_file() else None
    refused = False
    try:
        read(path)
    except ValueError as error:
        refused = True
        assert path.name in str(error), f"{what}: {error!r} does not name the file"
        assert len(str(error)) > len(str(path)) + 10, (
            f"{what}: {error!r} gives no reason"
        )
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    assert refused or not must_refuse, f"{what} was read"
    if content is not None:
        assert path.read_bytes() == content, f"{what}: the file was changed"
    assert before is None or path.stat().st_size == before
    done = path.parent / "unpacked"
    if done.exists():
        assert not refused, f"{what}: something was unpacked and then refused"
        for file in sorted(done.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        done.rmdir()
    assert not leftovers(path.parent, {path.name}), what


def damaged(whole: bytes, name: str, flips: int, step: int):
    """Yield (what was done, content): empty, cut at every `step` bytes, and `flips`
    single bits, drawn by the name.
    """
    yield "empty", b""
    for length in range(step, len(whole), step):
        yield f"cut to {length} of {len(whole)} bytes", whole[:length]
    rng = random.Random(name)
    for number in range(flips):
        # The first hundred bytes hold the headers: a third of the flips go there.
        place = rng.randrange(min(100, len(whole)) if number % 3 == 0 else len(whole))
        bit = rng.randrange(8)
        flipped = bytearray(whole)
        flipped[place] ^= 1 << bit
        yield f"bit {bit} of byte {place} flipped", bytes(flipped)


def wreck(path, cases, flips, step):
    write, read, checked = KINDS[path.name]
    write(path)
    whole = path.read_bytes()
    read(path)  # the file as it was written is good
    unpacked = path.parent / "unpacked"
    if unpacked.exists():
        try_it(path, whole, lambda p: None, False, "whole")
    counters = {kind: cases(f"files: {kind}") for kind in ("cut short", "bits flipped")}
    start = peak()
    for what, content in damaged(whole, path.name, flips, step):
        cut = "flipped" not in what
        # A table that ends with a complete row, and images or archives without their
        # unused end, are read correctly.
        must_fail = checked or what == "empty" and path.suffix != ".csv"
        try_it(path, content, read, must_fail, f"{path.name}, {what}")
        counters["cut short" if cut else "bits flipped"].survive()
    assert peak() - start < MEMORY, f"{(peak() - start) / 2**20:.0f} MiB"


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_cut_and_flipped_files(tmp_path, cases, name):
    wreck(tmp_path / name, cases, flips=40, step=16 * 1024)


@pytest.mark.long
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_files_cut_at_every_kilobyte_and_a_thousand_flips(tmp_path, cases, name):
    wreck(tmp_path / name, cases, flips=1000, step=1024)


# ---- files made to do harm ----


def refused(path, read, counter, what):
    """Assert a ValueError with the name, no changed or new file, and little memory."""
    before, start = path.stat(), peak()
    with refuses() as error:
        read(path)
    assert path.name in str(error.value), f"{what}: {error.value}"
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns), (
        what
    )
    assert not leftovers(path.parent, {path.name}), what
    assert peak() - start < MEMORY, f"{what}: {(peak() - start) / 2**20:.0f} MiB"
    counter.survive()


MODELS = [name for name, (_, _, checked) in KINDS.items() if checked]
HEADERS = {
    "no header": struct.pack("<Q", 0),
    "a header of 2^64 - 1 bytes": struct.pack("<Q", 2**64 - 1) + b"{}",
    "a header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "a header longer than the file": struct.pack("<Q", 2**20) + b"{}",
    "no JSON": struct.pack("<Q", 8) + b"nonsense",
    "JSON that is no object": struct.pack("<Q", 8) + b"[1,2,3] ",
    "bytes that are no text": struct.pack("<Q", 8) + b"\xff" * 8,
    "brackets ten thousand deep": (
        struct.pack("<Q", 80_000) + b'{"a":' * 10_000 + b" " * 30_000
    ),
}


def entry(shape=(1,), offsets=(0, 4), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


ENTRIES = {
    "a tensor of 2^62 numbers": entry([2**31, 2**31]),
    "a shape that overflows": entry([2**40, 2**40]),
    "a negative shape": entry([-1]),
    "offsets beyond the file": entry(offsets=[2**40, 2**40 + 4]),
    "offsets that end before they begin": entry(offsets=[4, 0]),
    "negative offsets": entry(offsets=[-4, 0]),
    "offsets of 2^64": entry(offsets=[0, 2**64]),
    "an unknown dtype": entry(dtype="F99"),
    "no dtype": {"shape": [1], "data_offsets": [0, 4]},
}


def format_of(path):
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return json.loads(header["__metadata__"]["paperlib"])["format"]


# One function reads the headers of all models.
@pytest.mark.parametrize(
    "name", [pytest.param(m, marks=pytest.mark.long) for m in MODELS[1:]] + MODELS[:1]
)
def test_absurd_headers(tmp_path, cases, name):
    write, read, _ = KINDS[name]
    path = tmp_path / name
    write(path)
    metadata = {"paperlib": json.dumps({"format": format_of(path)}), "sha256": "0" * 64}
    counter = cases("files: absurd safetensors header")
    for what, content in HEADERS.items():
        path.write_bytes(content)
        refused(path, read, counter, what)
    twice = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    for what, entries in (
        *((what, {"mean": odd}) for what, odd in ENTRIES.items()),
        ("two tensors in one place", twice | {"b": twice["a"]}),
        ("metadata of numbers", {"__metadata__": {"paperlib": 1}} | twice),
        (
            "a hundred thousand tensors of nothing",
            {str(n): entry([0], [0, 0]) for n in range(100_000)},
        ),
    ):
        header = json.dumps({"__metadata__": metadata} | entries).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
        refused(path, read, counter, what)


@pytest.mark.parametrize("name", MODELS)
def test_other_and_newer_models(tmp_path, cases, name):
    write, read, _ = KINDS[name]
    path = tmp_path / name
    counter = cases("files: of another model, or newer")
    for other in MODELS:
        if other != name:
            KINDS[other][0](path)
            refused(path, read, counter, other)
    write(path)
    kind, _, version = format_of(path).rpartition(".")
    others = [f"{kind}.{other}" for other in (int(version) + 1, 999, "x")]
    for found in (*others, kind, "", None, 7):
        path.write_bytes(
            save({"a": torch.ones(1)}, {"paperlib": json.dumps({"format": found})})
        )
        refused(path, read, counter, found)


# A checksum detects corruption, but not forged files, which may be inconsistent.
ODD = (None, -1, "x", 1.5, [], [1], {}, [1, 2, 3], {"a": 1})


def made_up(about, tensors, odd_values):
    """Yield (what, about, tensors): a missing part, or a wrong type, shape or value."""
    yield "no tensor", about, {}
    for name, tensor in tensors.items():
        without = {key: value for key, value in tensors.items() if key != name}
        yield f"no {name}", about, without
        for what, other in (
            ("integers", tensor.to(torch.int32)),
            ("one number", tensor.flatten()[:1]),
            ("nothing", tensor.flatten()[:0]),
            ("another rank", tensor[None]),
        ):
            yield f"{name} of {what}", about, without | {name: other}
    for name, value in about.items():
        yield (
            f"no {name}",
            {key: other for key, other in about.items() if key != name},
            tensors,
        )
        for odd in odd_values:
            yield f"{name}={odd}", about | {name: odd}, tensors
        for key in value if isinstance(value, dict) else ():
            for odd in odd_values:
                yield f"{name}.{key}={odd}", about | {name: value | {key: odd}}, tensors
        if isinstance(value, dict):
            yield f"more in {name}", about | {name: value | {"evil": 1}}, tensors


@pytest.mark.parametrize(
    "odd_values", [ODD[:3], pytest.param(ODD, marks=pytest.mark.long)], ids=len
)
@pytest.mark.parametrize("name", MODELS)
def test_files_that_somebody_made_up(tmp_path, cases, name, odd_values):
    """Their checksum is right. A ValueError that names them, or something that can be
    used.
    """
    write, read, _ = KINDS[name]
    path = tmp_path / name
    write(path)
    format = format_of(path)
    about, tensors = storage.read_tensors(path, format, "", "")
    del about["format"]
    counter = cases("files: whole, but made up")
    for what, said, held in made_up(about, tensors, odd_values):
        storage.write_tensors(path, held, said, format)
        try_it(path, None, read, False, f"{name}, {what}")
        counter.survive()


def test_a_made_up_padim_is_refused(tmp_path):
    path = tmp_path / "padim.safetensors"
    write, read, _ = KINDS[path.name]
    write(path)
    about, tensors = storage.read_tensors(path, "paperlib.padim.1", "", "")
    for name in ("mean", "whitening", "channels"):
        good = tensors[name]
        # The factors may be float16.
        other_dtype = torch.int64 if name == "whitening" else torch.float16
        for bad in (good[None], good[:-1], good.to(other_dtype), None):
            held = {key: value for key, value in tensors.items() if key != name} | (
                {} if bad is None else {name: bad}
            )
            storage.write_tensors(path, held, about, "paperlib.padim.1")
            with refuses("padim.safetensors is inconsistent"):
                read(path)
    odd = tensors | {"mean": tensors["mean"] * float("nan")}
    storage.write_tensors(path, odd, about, "paperlib.padim.1")
    with refuses("padim.safetensors is inconsistent"):
        read(path)
    for name, bad in (
        ("layers", 5),
        ("layers", [5]),
        ("grid", [12, 11]),
        ("grid", [144]),
        ("size", [24, 0]),
        ("count", True),
        ("settings", {}),
    ):
        storage.write_tensors(path, tensors, about | {name: bad}, "paperlib.padim.1")
        with refuses("padim.safetensors is inconsistent"):
            read(path)
    settings = about["settings"] | {"epsilon": -1}
    storage.write_tensors(
        path, tensors, about | {"settings": settings}, "paperlib.padim.1"
    )
    with refuses(
        "padim.safetensors can't be used with these settings .*epsilon=-1",
    ):
        read(path)


def test_a_made_up_checkpoint_is_refused_and_changes_nothing(tmp_path):
    path = tmp_path / "run.safetensors"
    KINDS[path.name][0](path)
    about, tensors = storage.read_tensors(path, "paperlib.checkpoint.1", "", "")
    model, optimizers = trained()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for place in ("-1.0.a", "x.0.a", "0.-1.a", "0", "9.0.a"):
        odd = tensors | {f"optimizer.{place}": torch.zeros(6, 3, 3, 3)}
        storage.write_tensors(path, odd, about, "paperlib.checkpoint.1")
        with refuses("run.safetensors is the checkpoint of another optimizer"):
            load_checkpoint(path, model, optimizers, RECIPE)
    halved = {
        name: value.half() if name.startswith("model.") else value
        for name, value in tensors.items()
    }
    storage.write_tensors(path, halved, about, "paperlib.checkpoint.1")
    with refuses("run.safetensors is the checkpoint of another model"):
        load_checkpoint(path, model, optimizers, RECIPE)
    for name in ("recipe", "progress", "scalars"):
        for bad in (None, [], 7):
            storage.write_tensors(
                path, tensors, about | {name: bad}, "paperlib.checkpoint.1"
            )
            with refuses("run.safetensors is inconsistent"):
                load_checkpoint(path, model, optimizers, RECIPE)
    for bad in (
        None,
        7,
        [7],
        [[1, 0.5]],
        [[1, 0.5, "x"]],
        [[None, 0.5, 0.5]],
        [[1.0, 0.5, 0.5]],
        {"1": [1, 0.5, 0.5]},
    ):
        progress = about["progress"] | {"history": bad}
        storage.write_tensors(
            path, tensors, about | {"progress": progress}, "paperlib.checkpoint.1"
        )
        with refuses(
            "run.safetensors is inconsistent: .* .a history of 3 columns.",
        ):
            load_checkpoint(path, model, optimizers, RECIPE, 3)
    assert all(
        torch.equal(value, before[name]) for name, value in model.state_dict().items()
    )


def anonymous() -> int:
    """Bytes of memory that belong to no file."""
    with open("/proc/self/status") as status:
        return next(
            int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon")
        )


def test_a_sparse_file_of_gigabytes_takes_no_memory(tmp_path, cases, monkeypatch):
    """A few blocks on the disk, 2 GiB to a reader, and the right format: its checksum
    is compared before it is kept.
    """
    path, size, seen = tmp_path / "padim.safetensors", 2 * 2**30, []
    about = json.dumps({"format": "paperlib.padim.1"})
    metadata = {"paperlib": about, "sha256": "0" * 64}
    mean = entry([size // 4], [0, size])
    header = json.dumps({"__metadata__": metadata, "mean": mean}).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    checksum = storage.checksum

    def checksum_of_beginnings(text, tensors):
        return checksum(text, {name: tensor[:9] for name, tensor in tensors.items()})

    monkeypatch.setattr(storage, "checksum", checksum_of_beginnings)
    clone = torch.Tensor.clone
    monkeypatch.setattr(
        torch.Tensor, "clone", lambda *a, **k: (seen.append(1), clone(*a, **k))[1]
    )
    before = anonymous()
    with refuses("padim.safetensors is corrupt"):
        PaDiM.load(path)
    assert not seen and anonymous() - before < MEMORY
    cases("files: bombs").survive()


def test_small_files_of_huge_tensors(tmp_path, cases):
    """A view of one number may have any shape, in a file of a few kilobytes."""
    counter, path = cases("files: bombs"), tmp_path / "released.pkl"
    weights = encoder().state_dict()
    for n in (10**6, 10**12):
        one = torch.zeros(1)
        huge = {
            "conv2.bias": (n,),
            "conv2.weight": (n, 128, 1, 1),
            "conv1.weight": (128, n, 2, 2),
            "enc.conv8.bias": (n,),
            "enc.conv8.weight": (n, 32, 3, 3),
        }
        changed = weights | {name: one.expand(shape) for name, shape in huge.items()}
        for zipped in (False, True):
            save = torch.save if zipped else save_pickled
            save(collections.OrderedDict(changed), path)
            refused(path, load_released_weights, counter, n)
    path = path.rename(tmp_path / "weights.pth")
    for odd in (
        lambda t: torch.zeros(1).expand(t.shape),
        lambda t: t.to_sparse(),
        lambda t: torch.empty_like(t, device="meta"),
        lambda t: torch.empty(10**12, device="meta"),
        lambda t: torch.zeros(1).expand(10**12),
    ):
        state = {name: odd(tensor) for name, tensor in network().state_dict().items()}
        torch.save(state, path)
        refused(path, read_state, counter, odd)
    for name, tensor in weights.items():
        path = path.rename(tmp_path / "released.pkl")
        torch.save(collections.OrderedDict(weights | {name: tensor.to_sparse()}), path)
        refused(path, load_released_weights, counter, name)


def test_weights_packed_a_thousandfold(tmp_path, cases):
    plain, path = tmp_path / "plain", tmp_path / "weights.pth"
    torch.save({"0.weight": torch.zeros(2**26)}, plain)  # 256 MiB
    with (
        zipfile.ZipFile(plain) as source,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as target,
    ):
        for info in source.infolist():
            with source.open(info) as from_, target.open(info.filename, "w") as to:
                while chunk := from_.read(2**20):
                    to.write(chunk)
    plain.unlink()
    assert path.stat().st_size < 2**21
    for read in (read_state, load_released_weights):
        refused(path, read, cases("files: bombs"), "packed")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize(
    "name", [name for name in KINDS if not name.startswith("cells")]
)
@pytest.mark.filterwarnings("ignore")
def test_code_in_files_is_not_run(tmp_path, cases, name):
    counter, (_, read, _) = cases("files: pickles with code"), KINDS[name]
    (tmp_path / "here").mkdir()
    path, ran = tmp_path / "here" / name, tmp_path / "ran"
    read = {"cell.png": read_image}.get(name, read)
    state = network().state_dict()
    for content in (
        lambda: path.write_bytes(pickle.dumps(Payload(ran))),
        lambda: path.write_bytes(pickle.dumps({"0.weight": Payload(ran)}, protocol=0)),
        lambda: torch.save(Payload(ran), path),
        lambda: torch.save(state | {"0.weight": Payload(ran)}, path),
        lambda: save_pickled(state | {"0.weight": Payload(ran)}, path),
        lambda: torch.save(network(), path),
        lambda: np.save(path.open("wb"), np.array([Payload(ran)], dtype=object)),
    ):
        content()
        with refuses(name):
            read(path)
        assert not ran.exists()
        counter.survive()


def test_postscript_with_an_image_name_is_not_run(tmp_path, cases, monkeypatch):
    """Pillow passes EPS content to a PostScript interpreter, whatever its name."""
    started = []
    monkeypatch.setattr("subprocess.check_call", lambda *a, **k: started.append(a))
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: started.append(a))
    monkeypatch.setattr("PIL.EpsImagePlugin.has_ghostscript", lambda: True)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs", raising=False)
    source = (
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(x)"
        " run\nshowpage\n"
    )
    for ending in ("png", "jpg", "tif"):
        path = tmp_path / f"cell.{ending}"
        path.write_text(source)
        for read in (read_image, read_mask):
            with refuses(f"cell.{ending}: cannot identify image file"):
                read(path)
            cases("files: PostScript as a picture").survive()
    assert not started


def tar_header(kind, size, name="././@LongLink"):
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def archives():
    """Yield (name, content) of small archives that declare enormous sizes."""
    end = bytes(1024)
    mebibyte = gzip.compress(bytes(2**20))  # a gzip file may have several members
    for kind in (
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
    ):
        first = gzip.compress(tar_header(kind, 2**29))
        last = gzip.compress(tar_header(b"0", 0, "x") + end)
        yield "a name of half a gigabyte.tar.gz", first + 512 * mebibyte + last
    nested = tar_header(tarfile.GNUTYPE_LONGNAME, 3) + b"abc".ljust(512, b"\0")
    yield "names of names.tar", nested * 5000 + tar_header(b"0", 0, "x") + end
    yield "a size of 2^60.tar", tar_header(b"0", 2**60, "x") + end
    for name in ("x" * 5000, "a/" * 3000 + "x"):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as archive:
            archive.addfile(tarfile.TarInfo(name))
        yield "a long name.tar", file.getvalue()
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(name, b"")
        yield "a long name.zip", file.getvalue()
    file = io.BytesIO()
    with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("zeros", "w") as member,
    ):
        for _ in range(256):
            member.write(bytes(2**20))
    yield "zeros.zip", file.getvalue()


def test_archives_that_would_take_all_memory_or_disk(tmp_path, cases):
    counter = cases("files: bombs")
    for name, content in archives():
        path = tmp_path / name
        path.write_bytes(content)
        start = peak()
        with refuses(name[:-7]):
            unpack(path, tmp_path / "out", max_bytes=2**26)
        assert peak() - start < MEMORY / 4, name
        path.unlink()
        assert not os.listdir(tmp_path), name
        counter.survive()
