"""A small data set in MVTec AD's layout: real textures, with synthetic defects for the
test part.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from paperlib.datasets import synthetic_defects, textures


def write(
    root: Path,
    category: str,
    texture: str,
    train: int = 6,
    good: int = 3,
    defective: int = 3,
) -> None:
    def save(array, *parts):
        path = root.joinpath(category, *parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)

    def grey(item):
        return (255 * item.image[0]).round().byte().numpy()

    for number, item in enumerate(textures(texture, "train", count=train, size=128)):
        save(grey(item), "train", "good", f"{number:03}.png")
    test = textures(texture, "test", count=good + defective, size=128)
    painted = synthetic_defects(test, kinds=["stain"], contrast=0.9)
    for number in range(good):
        save(grey(test[number]), "test", "good", f"{number:03}.png")
    for number in range(defective):
        item = painted[good + number]
        save(grey(item), "test", "stain", f"{number:03}.png")
        save(
            item.mask.numpy().astype(np.uint8) * 255,
            "ground_truth",
            "stain",
            f"{number:03}_mask.png",
        )
