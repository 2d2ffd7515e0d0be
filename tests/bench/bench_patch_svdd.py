"""Compare the steps of Patch SVDD, and the whole detector, with other implementations.

- embedding: one dense pass, and batches of 64 patches through the same encoder;
- spreading: `spread_patch_scores`, and the loop over patches;
- neighbours: `nearest_distance`, faiss's flat index and scikit-learn's KD-tree;
- whole: the detector with both patch sizes, without a coreset, and the published
  procedure.
"""

import math

import torch
import torch.nn.functional as F
from measure import COMMON, OURS, Contender, Part, peer
from torch import Tensor, nn

from paperlib.anomaly_map import spread_patch_scores
from paperlib.complexity import profile
from paperlib.datasets import elpv
from paperlib.neighbors import nearest_distance
from paperlib.patch_svdd import HierarchicalEncoder, PatchSVDD, train

SIDE = 256
SIZES = (("small", 32, 4), ("big", 64, 16))  # name, patch and stride in pixels


def as_cells(images: Tensor) -> Tensor:
    """Convert grey bytes (N, H, W) to RGB (N, 3, 256, 256) in [0, 1]."""
    resized = F.interpolate(
        images[:, None].float() / 255, (SIDE, SIDE), mode="bilinear", antialias=True
    )
    return resized.clamp(0, 1).expand(-1, 3, -1, -1)


def cells(count: int) -> Tensor:
    """Load the first solar cells without a defect."""
    elpv_cells = elpv("mono")
    return as_cells(elpv_cells.images[elpv_cells.probability == 0][:count])


@torch.no_grad()
def by_batches(
    encoder: torch.nn.Module, image: Tensor, patch: int, stride: int
) -> Tensor:
    """Embed cropped patches in batches of 64, as the released code does: (h, w, D)."""
    crops = image.unfold(1, patch, stride).unfold(2, patch, stride)
    rows, columns = crops.shape[1:3]
    patches = crops.permute(1, 2, 0, 3, 4).reshape(-1, 3, patch, patch)
    return torch.cat([encoder(batch) for batch in patches.split(64)]).view(
        rows, columns, -1
    )


def by_loop(scores: Tensor, patch: int, stride: int, side: int) -> Tensor:
    """Spread scores (N, h, w) to (N, side, side) in NumPy, like the released code."""
    maps = []
    for grid in scores.numpy():
        sums, counts = torch.zeros(2, side, side).numpy()
        for i in range(grid.shape[0]):
            for j in range(grid.shape[1]):
                window = (
                    slice(i * stride, i * stride + patch),
                    slice(j * stride, j * stride + patch),
                )
                sums[window] += grid[i, j]
                counts[window] += 1
        counts[counts == 0] = 1
        maps.append(torch.from_numpy(sums / counts))
    return torch.stack(maps)


class Dense(nn.Module):
    """A dense pass as a forward method, for `profile`."""

    def __init__(self, encoder: HierarchicalEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        small = self.encoder.enc.dense(images, 4)
        return self.encoder.aggregate(small, 4, 4, exact=False)


def macs_per_image(encoder: HierarchicalEncoder) -> int:
    return profile(Dense(encoder), (1, 3, SIDE, SIDE)).macs


def make_data(count: int, device: torch.device) -> tuple[HierarchicalEncoder, Tensor]:
    torch.manual_seed(0)
    return HierarchicalEncoder().to(device), cells(count).to(device)


def embedding(full: bool, device: torch.device) -> Part:
    encoder, images = make_data(3, device)
    images = images - images.mean(0)

    def batches() -> Tensor:
        small = by_batches(encoder.small, images[0], 32, 4)
        big = by_batches(encoder, images[0], 64, 16)
        return torch.cat([small.flatten(), big.flatten()])

    def dense() -> Tensor:
        embeddings = encoder.embed(images[:1])
        return torch.cat([embeddings.small.flatten(), embeddings.big.flatten()])

    moved = 4 * (
        images[0].numel()
        + sum(p.numel() for p in encoder.parameters())
        + dense().numel()
    )
    return Part(
        "Patch SVDD, embed 1 image",
        [
            Contender(OURS, dense),
            Contender(COMMON, batches, note="batches of 64 patches"),
        ],
        macs_per_image(encoder),
        moved,
        {},
    )


def spreading(full: bool, device: torch.device) -> Part:
    scores = torch.rand(4, 57, 57, generator=torch.Generator().manual_seed(0))
    on_device, missing = scores.to(device), {}
    contenders = [Contender(OURS, lambda: spread_patch_scores(on_device, 32, 4, SIDE))]
    if device.type == "cpu":
        contenders.append(
            Contender(
                COMMON,
                lambda: by_loop(scores, 32, 4, SIDE),
                note="a loop over patches",
            )
        )
    else:
        missing[COMMON] = "runs on the CPU only"
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
    device_bank, device_queries = bank.to(device), queries.to(device)
    contenders = [
        Contender(
            OURS,
            lambda: nearest_distance(device_queries, device_bank),
            note="verifies that rounding hides no nearer vector",
        )
    ]
    missing = {}
    if device.type != "cpu":
        contenders.append(
            Contender(
                "torch.cdist",
                lambda: torch.cdist(device_queries, device_bank).amin(1),
            )
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
        f"nearest of {count:,} for 3,249 queries, 64 dimensions",
        contenders,
        count * len(queries) * 64,
        bank.nbytes + queries.nbytes,
        missing,
    )


def whole(full: bool, device: torch.device) -> Part:
    train, test = (8, 2) if full else (2, 1)
    encoder, images = make_data(train + test, device)

    def ours() -> Tensor:
        return PatchSVDD(encoder).fit(images[:train]).anomaly_maps(images[train:]).mult

    def published() -> Tensor:
        """Embed in batches, search a bank on the host, and spread in a loop."""
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
                queries = x.flatten(0, 1).numpy()
                if name == "small":
                    nearest = (
                        torch.from_numpy(index.search(queries, 1)[0][:, 0])
                        .clamp_min(0)
                        .sqrt()
                    )
                else:
                    nearest = torch.from_numpy(tree.query(queries, 1)[0][:, 0]).float()
                scores = nearest.view(1, *x.shape[:2])
                pixels = by_loop(scores, patch, stride, SIDE)[0]
                maps.append(pixels if name == "small" else maps[number] * pixels)
        return torch.stack(maps[test:])

    contenders, missing = [Contender(OURS, ours)], {}
    with peer(missing, COMMON):
        import faiss  # noqa: F401
        import sklearn.neighbors  # noqa: F401

        contenders.append(
            Contender(
                COMMON,
                published,
                note="the published procedure, with faiss instead of NGT",
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
        f"Patch SVDD, fit {train} images and score {test}",
        contenders,
        count * macs_per_image(encoder) + searched,
        images.nbytes + 4 * count * patches * 64,
        missing,
    )


def training(full: bool, device: torch.device) -> Part:
    encoder, images = make_data(8, device)
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

    # The backward pass has two products of the same size per product.
    macs = 3 * profile(Maps(), (crops, 3, side, side)).macs
    moved = 3 * 4 * (crops * 3 * side**2 + sum(p.numel() for p in encoder.parameters()))
    contenders = [
        Contender(
            OURS,
            ours,
            compared=False,
            note="in bfloat16 where that is fast, for which the floor is no bound;"
            " no peer for this task",
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
