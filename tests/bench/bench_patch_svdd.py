"""Patch SVDD's parts beside how they are usually done, and the whole detector beside
the published procedure.

Embedding: one dense pass beside batches of 64 patches through the same encoder.
Spreading: beside the loop over patches. Neighbours: beside faiss's flat index and
scikit-learn's KD-tree. Whole: both sizes, nothing thinned.
"""

import math

import torch
import torch.nn.functional as F
from measure import OURS, USUAL, Contender, Part, peer
from torch import Tensor, nn

from paperlib.anomaly_map import spread_patch_scores
from paperlib.complexity import profile
from paperlib.datasets import elpv
from paperlib.neighbors import nearest_distance
from paperlib.patch_svdd import HierarchicalEncoder, PatchSVDD, train

SIDE = 256
SIZES = (("small", 32, 4), ("big", 64, 16))  # name, patch and stride in pixels


def as_cells(images: Tensor) -> Tensor:
    """Grey bytes (N, H, W) as RGB (N, 3, 256, 256) in [0, 1]."""
    large = F.interpolate(
        images[:, None].float() / 255, (SIDE, SIDE), mode="bilinear", antialias=True
    )
    return large.clamp(0, 1).expand(-1, 3, -1, -1)


def cells(count: int) -> Tensor:
    """The first solar cells without a defect."""
    found = elpv("mono")
    return as_cells(found.images[found.probability == 0][:count])


@torch.no_grad()
def by_batches(
    encoder: torch.nn.Module, image: Tensor, patch: int, stride: int
) -> Tensor:
    """Embed an image's patches as the released code does: cut out, 64 at a time; (h, w,
    D).
    """
    cut = image.unfold(1, patch, stride).unfold(2, patch, stride)
    rows, columns = cut.shape[1:3]
    patches = cut.permute(1, 2, 0, 3, 4).reshape(-1, 3, patch, patch)
    return torch.cat([encoder(batch) for batch in patches.split(64)]).view(
        rows, columns, -1
    )


def by_the_loop(scores: Tensor, patch: int, stride: int, side: int) -> Tensor:
    """Spread scores (N, h, w) to (N, side, side) as the released code, in NumPy."""
    maps = []
    for grid in scores.numpy():
        total, covering = torch.zeros(2, side, side).numpy()
        for i in range(grid.shape[0]):
            for j in range(grid.shape[1]):
                window = (
                    slice(i * stride, i * stride + patch),
                    slice(j * stride, j * stride + patch),
                )
                total[window] += grid[i, j]
                covering[window] += 1
        covering[covering == 0] = 1
        maps.append(torch.from_numpy(total / covering))
    return torch.stack(maps)


class Dense(nn.Module):
    """One dense pass as a forward, to count what it multiplies."""

    def __init__(self, encoder: HierarchicalEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        small = self.encoder.enc.dense(images, 4)
        return self.encoder.aggregate(small, 4, 4, exact=False)


def macs_an_image(encoder: HierarchicalEncoder) -> int:
    return profile(Dense(encoder), (1, 3, SIDE, SIDE)).macs


def given(count: int, device: torch.device) -> tuple[HierarchicalEncoder, Tensor]:
    torch.manual_seed(0)
    return HierarchicalEncoder().to(device), cells(count).to(device)


def embedding(full: bool, device: torch.device) -> Part:
    encoder, images = given(3, device)
    images = images - images.mean(0)

    def batches() -> Tensor:
        small = by_batches(encoder.small, images[0], 32, 4)
        big = by_batches(encoder, images[0], 64, 16)
        return torch.cat([small.flatten(), big.flatten()])

    def dense() -> Tensor:
        found = encoder.embed(images[:1])
        return torch.cat([found.small.flatten(), found.big.flatten()])

    moved = 4 * (
        images[0].numel()
        + sum(p.numel() for p in encoder.parameters())
        + dense().numel()
    )
    return Part(
        "Patch SVDD, embed 1 image",
        [
            Contender(OURS, dense),
            Contender(USUAL, batches, note="batches of 64 patches"),
        ],
        macs_an_image(encoder),
        moved,
        {},
    )


def spreading(full: bool, device: torch.device) -> Part:
    scores = torch.rand(4, 57, 57, generator=torch.Generator().manual_seed(0))
    there, missing = scores.to(device), {}
    contenders = [Contender(OURS, lambda: spread_patch_scores(there, 32, 4, SIDE))]
    if device.type == "cpu":
        contenders.append(
            Contender(
                USUAL,
                lambda: by_the_loop(scores, 32, 4, SIDE),
                note="a loop over patches",
            )
        )
    else:
        missing[USUAL] = "runs on the CPU only"
    return Part(
        "Patch SVDD, spread scores of 4 images",
        contenders,
        0,
        scores.nbytes + 4 * 4 * SIDE**2,
        missing,
    )


def neighbours(full: bool, device: torch.device) -> Part:
    generator, count = torch.Generator().manual_seed(0), 200_000 if full else 60_000
    bank = torch.randn(count, 64, generator=generator)
    queries = torch.randn(3249, 64, generator=generator)
    there, asked = bank.to(device), queries.to(device)
    contenders = [
        Contender(
            OURS,
            lambda: nearest_distance(asked, there),
            note="proves that rounding hid no nearer one",
        )
    ]
    missing = {}
    if device.type != "cpu":
        contenders.append(
            Contender("torch.cdist", lambda: torch.cdist(asked, there).amin(1))
        )
        missing |= dict.fromkeys(
            ("faiss", "scikit-learn"), "runs on the CPU only (faiss-cpu)"
        )
    else:
        with peer(missing, "faiss"):
            import faiss

            faiss.omp_set_num_threads(torch.get_num_threads())
            flat = faiss.IndexFlatL2(64)
            flat.add(bank.numpy())
            contenders.append(
                Contender(
                    "faiss",
                    lambda: torch.from_numpy(
                        flat.search(queries.numpy(), 1)[0][:, 0]
                    ).sqrt(),
                    note="flat index",
                )
            )
        with peer(missing, "scikit-learn"):
            from sklearn.neighbors import KDTree

            tree, few = KDTree(bank.numpy()), queries[:50]
            contenders.append(
                Contender(
                    "scikit-learn",
                    lambda: torch.from_numpy(
                        tree.query(few.numpy(), 1)[0][:, 0]
                    ).float(),
                    share=len(few) / len(queries),
                    note="KD-tree; timed on 50 queries",
                )
            )
    return Part(
        f"nearest of {count:,} for 3,249 queries, 64 numbers each",
        contenders,
        count * len(queries) * 64,
        bank.nbytes + queries.nbytes,
        missing,
    )


def whole(full: bool, device: torch.device) -> Part:
    train, test = (8, 2) if full else (2, 1)
    encoder, images = given(train + test, device)

    def ours() -> Tensor:
        return PatchSVDD(encoder).fit(images[:train]).anomaly_maps(images[train:]).mult

    def published() -> Tensor:
        """Patches in batches, a bank on the host, the nearest by a KD-tree and by
        faiss, and the loop over patches.
        """
        import faiss
        from sklearn.neighbors import KDTree

        mean, maps = images[:train].mean(0), []
        for name, patch, stride in SIZES:
            network = encoder.small if name == "small" else encoder
            embedded = [
                by_batches(network, image - mean, patch, stride).cpu()
                for image in images
            ]
            bank = torch.cat([x.flatten(0, 1) for x in embedded[:train]]).numpy()
            if name == "small":
                index = faiss.IndexFlatL2(bank.shape[1])
                index.add(bank)
            else:
                tree = KDTree(bank)
            for number, x in enumerate(embedded[train:]):
                asked = x.flatten(0, 1).numpy()
                if name == "small":
                    nearest = (
                        torch.from_numpy(index.search(asked, 1)[0][:, 0])
                        .clamp_min(0)
                        .sqrt()
                    )
                else:
                    nearest = torch.from_numpy(tree.query(asked, 1)[0][:, 0]).float()
                spread = by_the_loop(
                    nearest.view(1, *x.shape[:2]), patch, stride, SIDE
                )[0]
                maps.append(spread if name == "small" else maps[number] * spread)
        return torch.stack(maps[test:])

    contenders, missing = [Contender(OURS, ours)], {}
    with peer(missing, USUAL):
        import faiss  # noqa: F401
        import sklearn.neighbors  # noqa: F401

        contenders.append(
            Contender(
                USUAL, published, note="the published procedure; faiss for its NGT"
            )
        )
    count = train + test
    patches = sum(
        math.prod(((SIDE - patch) // stride + 1,) * 2) for _, patch, stride in SIZES
    )
    searched = (
        sum(((SIDE - patch) // stride + 1) ** 4 for _, patch, stride in SIZES)
        * train
        * test
        * 64
    )
    return Part(
        f"Patch SVDD, {train} images kept and {test} mapped",
        contenders,
        count * macs_an_image(encoder) + searched,
        images.nbytes + 4 * count * patches * 64,
        missing,
    )


def training(full: bool, device: torch.device) -> Part:
    encoder, images = given(8, device)
    crops, side = 8, 160
    encoder.requires_grad_()

    def ours() -> int:
        # One embedding per crop, as counted below.
        train(encoder, images, steps=1, crops=crops, side=side, shared_shift=True)
        return 0

    class Maps(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = encoder

        def forward(self, crop: Tensor) -> Tensor:
            return self.encoder.dense(crop)[1]

    # Forward, and two products of the same size backward.
    macs = 3 * profile(Maps(), (crops, 3, side, side)).macs
    moved = 3 * 4 * (crops * 3 * side**2 + sum(p.numel() for p in encoder.parameters()))
    contenders = [
        Contender(
            OURS,
            ours,
            compared=False,
            note="in bfloat16 where that is fast, for which the floor is no bound;"
            " no peer does this work",
        )
    ]
    return Part(
        f"Patch SVDD, train 1 step on {crops} crops", contenders, macs, moved, {}, crops
    )


PARTS = {
    "embedding": embedding,
    "spreading": spreading,
    "neighbours": neighbours,
    "whole": whole,
    "training": training,
}
