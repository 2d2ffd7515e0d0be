"""Train MobileNets and their full-convolution twin on solar cells, over several seeds
(`make results`).

Tables 4 and 6 of the MobileNet paper in miniature, on data that is here: functional
against defective ELPV cells. Writes book/data/results/mobilenet_cells.json, which
chapter 01 draws. Every finished run is written at once, and a run that the file already
holds is not repeated, so an interrupted command goes on where it stopped; `--force`
starts over.
"""

import statistics
import time

import results
import torch

from paperlib.datasets import CellSplit, elpv, split_cells
from paperlib.metrics import auroc
from paperlib.mobilenet import MobileNetV1, parameter_groups
from paperlib.training import predict, train_classifier

SIDE, EPOCHS, SEEDS = 128, 12, 5
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 4e-5
RECIPE = {
    "side": SIDE,
    "epochs": EPOCHS,
    "batch": 32,
    "learning rate": LEARNING_RATE,
    "weight decay": WEIGHT_DECAY,
}
MODELS = {
    "0.25 MobileNet": {"width": 0.25},
    "0.5 MobileNet": {"width": 0.5},
    "0.25 full convolution": {"width": 0.25, "separable": False},
}


def run(name: str, seed: int, cells: CellSplit) -> dict:
    """Train one model with one seed; the seed sets the split, the weights, the order
    and the flips.
    """
    torch.manual_seed(seed)
    model = MobileNetV1(num_classes=2, **MODELS[name]).to(
        memory_format=torch.channels_last
    )
    groups = parameter_groups(model, WEIGHT_DECAY)
    optimizer = torch.optim.RMSprop(groups, lr=LEARNING_RATE, alpha=0.9, momentum=0.9)
    # Processor time on one thread: unlike the wall clock it does not change with what
    # else the machine does.
    readings = [time.process_time()]
    history = train_classifier(
        model,
        (cells.train, cells.train_labels),
        optimizer,
        epochs=EPOCHS,
        seed=seed,
        on_epoch=lambda epoch: readings.append(time.process_time()),
    )
    logits = predict(model, cells.test)
    return {
        "model": name,
        "arguments": MODELS[name],
        "seed": seed,
        "accuracy": float((logits.argmax(1) == cells.test_labels).float().mean()),
        "auroc": auroc(cells.test_labels, logits[:, 1] - logits[:, 0]),
        "loss": [round(epoch.loss, 4) for epoch in history],
        "cpu_seconds_per_epoch": statistics.median(
            b - a for a, b in zip(readings, readings[1:], strict=False)
        ),
    }


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing."""
    found = results.Results(__file__, RECIPE, force=results.forced(__doc__, arguments))
    done = {(row["model"], row["seed"]) for row in found.runs}
    cells = elpv()
    for seed in range(SEEDS):
        split = split_cells(cells, side=SIDE, seed=seed)
        for name in MODELS:
            if (name, seed) in done:
                continue
            row = run(name, seed, split)
            found.runs.append(row)
            found.save()
            print(
                f"seed {seed}, {name}: accuracy {row['accuracy']:.3f}, AUROC"
                f" {row['auroc']:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
