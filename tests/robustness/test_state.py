"""One model shared by many threads, data sets read by forked workers, and calls
repeated a thousand times.
"""

import contextlib
import gc
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from paperlib.backbones import FeatureExtractor
from paperlib.cam import cam
from paperlib.complexity import profile
from paperlib.datasets import (
    TensorItems,
    batches,
    folder,
    synthetic_defects,
    textures,
    unpack,
)
from paperlib.gradcam import grad_cam, guided_backprop, guided_grad_cam
from paperlib.metrics import aupro
from paperlib.neighbors import nearest_distance
from paperlib.padim import PaDiM
from paperlib.patch_svdd import HierarchicalEncoder, PatchSVDD
from paperlib.storage import read_tensors, write_tensors
from paperlib.training import predict


def network():
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 6, 3, 2, 1),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3, 2, 1),
        nn.ReLU(),
    ]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    ).eval()


def pictures(n, height=24, width=20, seed=0):
    return torch.rand(
        n, 3, height, width, generator=torch.Generator().manual_seed(seed)
    )


@pytest.fixture(scope="module")
def shared():
    return make_shared()


def make_shared():
    """Everything that threads may share: one network, and detectors on it."""
    model = network()
    extractor = FeatureExtractor(model, ["2", "4"])
    torch.manual_seed(0)
    svdd = PatchSVDD(HierarchicalEncoder(4).eval(), stride_small=16, stride_big=16).fit(
        pictures(2, 64, 64)
    )
    padim = PaDiM(extractor, 9).fit(pictures(20, seed=1).split(5))
    return model, padim, svdd, extractor


def calls(shared, tmp_path):
    """Map names to functions of a number, whose results depend only on the number."""
    model, padim, svdd, extractor = shared
    bank = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    masks = pictures(2)[:, 0] > 0.9

    def written(n):
        path = tmp_path / f"{n}-{threading.get_ident()}.safetensors"
        write_tensors(path, {"x": pictures(1, seed=n)}, {"n": n}, "paperlib.thing.1")
        return read_tensors(path, "paperlib.thing.1", "thing", "")[1]["x"]

    return {
        "grad_cam": lambda n: grad_cam(model, pictures(2, seed=n), "4", n % 4).maps,
        "guided_backprop": lambda n: guided_backprop(model, pictures(2, seed=n), n % 4),
        "guided_grad_cam": lambda n: guided_grad_cam(
            model, pictures(1, seed=n), "2", n % 4
        ),
        "cam": lambda n: cam(model, pictures(2, seed=n), n % 4).maps,
        "predict": lambda n: predict(model, pictures(3, seed=n), 2),
        "profile": lambda n: torch.tensor(
            [float(profile(model, (1, 3, 24 + n % 5, 20)).macs)]
        ),
        "features": lambda n: extractor(pictures(2, seed=n))[1],
        "PaDiM": lambda n: padim.anomaly_map(pictures(2, seed=n)),
        "PaDiM.fit": lambda n: PaDiM(extractor, 5).fit([pictures(4, seed=n)]).mean,
        "Patch SVDD": lambda n: svdd.anomaly_maps(pictures(1, 64, 64, seed=n)).mult,
        "neighbours": lambda n: nearest_distance(torch.full((3, 6), n / 7), bank),
        "aupro": lambda n: torch.tensor([aupro(masks, pictures(2, seed=n)[:, 1])]),
        "files": written,
    }


NAMES = [
    "grad_cam",
    "guided_backprop",
    "guided_grad_cam",
    "cam",
    "predict",
    "profile",
    "features",
    "PaDiM",
    "PaDiM.fit",
    "Patch SVDD",
    "neighbours",
    "aupro",
    "files",
]


def hooks_and_modes(model):
    """All that a call could leave behind on a model."""
    tables = [name for name in vars(model) if name.endswith("_hooks")]
    return [
        (
            name,
            module.training,
            type(module).forward,
            *(len(getattr(module, table)) for table in tables),
        )
        for name, module in model.named_modules()
    ] + [
        (name, p.grad is None, p.requires_grad, p._version)
        for name, p in model.named_parameters()
    ]


@pytest.mark.parametrize("rounds", [1, pytest.param(40, marks=pytest.mark.long)])
def test_threads_that_share_a_model_get_the_same_results_as_alone(
    shared, tmp_path, cases, rounds
):
    """Eight threads make all calls in different orders, on shared models."""
    every = calls(shared, tmp_path)
    assert list(every) == NAMES
    alone = {(name, n): every[name](n) for name in every for n in range(5)}
    before = hooks_and_modes(shared[0])
    gate = threading.Barrier(8)

    def work(thread):
        order = torch.randperm(
            len(alone) * rounds, generator=torch.Generator().manual_seed(thread)
        ).tolist()
        jobs = list(alone) * rounds
        gate.wait()
        for number in order:
            name, n = jobs[number]
            found = every[name](n)
            assert torch.equal(found, alone[name, n]) or torch.allclose(
                found, alone[name, n], 1e-5, 1e-6
            ), (name, n)
        return len(order)

    with ThreadPoolExecutor(8) as pool:
        done = sum(pool.map(work, range(8)))
    assert hooks_and_modes(shared[0]) == before
    cases("state: threads on one model").survive(done)


# ---- forked workers ----


def as_lists(batch):
    return batch


@pytest.mark.parametrize("kind", ["files", "memory", "synthetic"])
def test_forked_workers_read_what_the_parent_reads(tmp_path, cases, kind, shared):
    for number in range(12):
        pixels = np.random.default_rng(number).integers(
            0, 256, (30 + number, 40, 3), dtype=np.uint8
        )
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    data = {
        "files": lambda: folder(tmp_path, size=24),
        "memory": lambda: TensorItems(pictures(12)),
        "synthetic": lambda: synthetic_defects(
            textures("brick", "test", count=12, size=64)
        ),
    }[kind]()
    # Workers are forked while the parent has running threads and hooks, as in a
    # notebook.
    with ThreadPoolExecutor(2) as pool:
        busy = [
            pool.submit(grad_cam, shared[0], pictures(1), "4", 0) for _ in range(50)
        ]
        loader = DataLoader(
            data, 4, num_workers=2, collate_fn=as_lists, multiprocessing_context="fork"
        )
        for _ in range(2):
            found = [item for batch in loader for item in batch]
            assert len(found) == 12
            for item, own in zip(found, (data[n] for n in range(12)), strict=True):
                assert torch.equal(item.image, own.image)
                assert (item.label, item.path) == (own.label, own.path)
                assert item.mask is own.mask is None or torch.equal(item.mask, own.mask)
                cases("state: forked workers").survive()
        assert all(
            torch.equal(job.result().maps, busy[0].result().maps) for job in busy
        )


# ---- a thousand calls ----


def memory() -> int:
    with open("/proc/self/status") as status:
        return next(
            int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon")
        )


def living() -> int:
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


def open_files() -> set[tuple[str, str]]:
    """Return number and target of each open file."""
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists the folder
            found.add((link.name, os.readlink(link)))
    return found


def repeated(call, times):
    for n in range(max(times // 10, 5)):  # what is kept once, is kept now
        call(n % 5)
    gc.collect()
    gc.freeze()  # the collector and living() pass over all that exists by now
    try:
        size, files = memory(), open_files()
        threads = set(threading.enumerate())
        for n in range(times):
            call(n % 5)
        assert living() == 0
    finally:
        gc.unfreeze()
    # No new ones; what an earlier test left behind may end meanwhile.
    assert set(threading.enumerate()) - threads == set()
    assert open_files() - files == set()
    return memory() - size


@pytest.mark.parametrize("times", [15, pytest.param(1000, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", NAMES)
def test_repeated_calls_leave_neither_memory_nor_hooks(
    shared, tmp_path, cases, name, times
):
    before = hooks_and_modes(shared[0])
    grown = repeated(calls(shared, tmp_path)[name], times)
    assert hooks_and_modes(shared[0]) == before
    # A call works on some 100 kB to 10 MB; a leak of 20 kB in each would show.
    assert grown < max(20_000 * times, 8 * 2**20), f"{grown / 2**20:.1f} MiB"
    cases("state: repeated calls").survive(times)


class Failing(nn.Module):
    def forward(self, x):
        raise RuntimeError("on purpose")


@pytest.mark.parametrize("times", [20, pytest.param(1000, marks=pytest.mark.long)])
def test_failed_calls_leave_no_state(tmp_path, cases, times):
    model = network()
    model.append(Failing())
    before, text = hooks_and_modes(model), tmp_path / "text.tar"
    text.write_text("no archive")

    def call(n):
        for fails in (
            lambda: grad_cam(model, pictures(1), "4", 0),
            lambda: guided_backprop(model, pictures(1), 0),
            lambda: cam(model, pictures(1), 0),
            lambda: profile(model, (1, 3, 24, 20)),
            lambda: predict(model, pictures(1)),
            lambda: FeatureExtractor(model, ["2", "8"])(pictures(1)),
            lambda: read_tensors(text, "paperlib.thing.1", "thing", ""),
            lambda: unpack(text, tmp_path / "out"),
            lambda: list(batches(folder(tmp_path))),
        ):
            with pytest.raises((RuntimeError, ValueError)):
                fails()

    assert repeated(call, times) < max(20_000 * times, 8 * 2**20)
    assert hooks_and_modes(model) == before
    cases("state: repeated calls").survive(9 * times)
