"""AUPRO beside anomalib's, pixel AUROC beside scikit-learn's, and the usual ways, on
maps shaped as MVTec's bottles.
"""

import numpy as np
import torch
from measure import OURS, USUAL, Contender, Part, peer
from scipy import ndimage
from torch import Tensor

from paperlib.metrics import aupro, pixel_auroc


def bottles(count: int) -> tuple[Tensor, Tensor]:
    """Masks of discs on three quarters of the pictures, and smooth noise that is higher
    where they are.
    """
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


def usual_aupro(masks: Tensor, maps: Tensor, steps: int = 200) -> float:
    """AUPRO as most published scripts have it: a grid of thresholds, every region and
    pixel looked at for each.
    """
    masks, maps = masks.numpy(), maps.numpy()
    regions = [
        (picture, labelled == k)
        for picture, mask in enumerate(masks)
        for labelled, n in [ndimage.label(mask, np.ones((3, 3)))]
        for k in range(1, n + 1)
    ]
    rates, overlaps = [], []
    for threshold in np.linspace(maps.max(), maps.min(), steps):
        found = maps >= threshold
        rates.append((found & ~masks).sum() / (~masks).sum())
        overlaps.append(
            np.mean([found[picture][region].mean() for picture, region in regions])
        )
    x, y = np.array(rates), np.array(overlaps)
    limit = 0.3
    inside = x <= limit
    x, y = np.append(x[inside], limit), np.append(y[inside], np.interp(limit, x, y))
    return float(np.trapezoid(y, x) / limit)


def on_host(device: torch.device, missing: dict[str, str], *names: str) -> None:
    if device.type != "cpu":
        missing |= dict.fromkeys(names, "runs on the CPU only")


def given(full: bool, device: torch.device) -> tuple[Tensor, Tensor, int]:
    masks, maps = bottles(83 if full else 20)
    return masks.to(device), maps.to(device), masks.nbytes + maps.nbytes


def region_overlap(full: bool, device: torch.device) -> Part:
    masks, maps, moved = given(full, device)
    contenders, missing = [Contender(OURS, lambda: aupro(masks, maps))], {}
    if device.type == "cpu":
        contenders.append(
            Contender(
                USUAL,
                lambda: usual_aupro(masks, maps),
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
    on_host(device, missing, USUAL)
    return Part(f"AUPRO, {len(maps)} maps of 224×224", contenders, 0, moved, missing)


def pixel_area(full: bool, device: torch.device) -> Part:
    masks, maps, moved = given(full, device)
    contenders, missing = [Contender(OURS, lambda: pixel_auroc(masks, maps))], {}
    with peer(missing, "scikit-learn"):
        from sklearn.metrics import roc_auc_score

        def sklearn() -> float:
            return float(roc_auc_score(masks.flatten().numpy(), maps.flatten().numpy()))

        if device.type == "cpu":
            contenders.append(Contender("scikit-learn", sklearn))
    on_host(device, missing, "scikit-learn")
    return Part(
        f"pixel AUROC, {len(maps)} maps of 224×224", contenders, 0, moved, missing
    )


PARTS = {"aupro": region_overlap, "pixel_auroc": pixel_area}
