"""Compare AUPRO with anomalib's and pixel AUROC with scikit-learn's.

The masks and maps have the number and size of MVTec AD's bottles.
"""

import numpy as np
import torch
from measure import COMMON, OURS, Contender, Part, peer
from scipy import ndimage
from torch import Tensor

from paperlib.metrics import aupro, pixel_auroc


def bottles(count: int) -> tuple[Tensor, Tensor]:
    """Draw masks of discs for three quarters of the images, and noisy maps of them."""
    random = np.random.default_rng(0)
    masks = np.zeros((count, 224, 224), dtype=bool)
    rows, columns = np.mgrid[:224, :224]
    for mask in masks[count // 4 :]:
        for _ in range(random.integers(1, 3)):
            (y, x), radius = random.uniform(40, 184, 2), random.uniform(6, 30)
            mask |= (rows - y) ** 2 + (columns - x) ** 2 < radius**2
    noise = ndimage.gaussian_filter(random.normal(size=masks.shape), (0, 4, 4))
    maps = noise / noise.std() + 2 * ndimage.gaussian_filter(
        masks.astype(float), (0, 4, 4)
    )
    return torch.from_numpy(masks), torch.from_numpy(maps.astype(np.float32))


def common_aupro(masks: Tensor, maps: Tensor, steps: int = 200) -> float:
    """Compute AUPRO as most published scripts do: from a grid of thresholds."""
    masks, maps = masks.numpy(), maps.numpy()
    regions = [
        (image, labels == k)
        for image, mask in enumerate(masks)
        for labels, n in [ndimage.label(mask, np.ones((3, 3)))]
        for k in range(1, n + 1)
    ]
    rates, overlaps = [], []
    for threshold in np.linspace(maps.max(), maps.min(), steps):
        predicted = maps >= threshold
        rates.append((predicted & ~masks).sum() / (~masks).sum())
        overlaps.append(
            np.mean([predicted[image][region].mean() for image, region in regions])
        )
    x, y = np.array(rates), np.array(overlaps)
    limit = 0.3
    below = x <= limit
    x, y = np.append(x[below], limit), np.append(y[below], np.interp(limit, x, y))
    return float(np.trapezoid(y, x) / limit)


def add_cpu_only(device: torch.device, missing: dict[str, str], *names: str) -> None:
    if device.type != "cpu":
        missing |= dict.fromkeys(names, "runs on the CPU only")


def make_data(full: bool, device: torch.device) -> tuple[Tensor, Tensor, int]:
    masks, maps = bottles(83 if full else 20)
    return masks.to(device), maps.to(device), masks.nbytes + maps.nbytes


def region_overlap(full: bool, device: torch.device) -> Part:
    masks, maps, moved = make_data(full, device)
    contenders, missing = [Contender(OURS, lambda: aupro(masks, maps))], {}
    if device.type == "cpu":
        contenders.append(
            Contender(
                COMMON,
                lambda: common_aupro(masks, maps),
                note="200 thresholds: not exact",
            )
        )
    with peer(missing, "anomalib"):
        from anomalib.metrics.aupro import _AUPRO

        def anomalib() -> float:
            metric = _AUPRO(fpr_limit=0.3).to(device)
            metric.update(maps, masks)
            return float(metric.compute())

        contenders.append(Contender("anomalib", anomalib))
    add_cpu_only(device, missing, COMMON)
    return Part(f"AUPRO, {len(maps)} maps of 224×224", contenders, 0, moved, missing)


def pixel_area(full: bool, device: torch.device) -> Part:
    masks, maps, moved = make_data(full, device)
    contenders, missing = [Contender(OURS, lambda: pixel_auroc(masks, maps))], {}
    with peer(missing, "scikit-learn"):
        from sklearn.metrics import roc_auc_score

        def sklearn() -> float:
            return float(roc_auc_score(masks.flatten().numpy(), maps.flatten().numpy()))

        if device.type == "cpu":
            contenders.append(Contender("scikit-learn", sklearn))
    add_cpu_only(device, missing, "scikit-learn")
    return Part(
        f"pixel AUROC, {len(maps)} maps of 224×224", contenders, 0, moved, missing
    )


PARTS = {"aupro": region_overlap, "pixel_auroc": pixel_area}
