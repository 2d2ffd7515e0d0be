"""Train MobileNets and a network of full convolutions on solar cells (`make results`).

A small version of the MobileNet paper's Tables 4 and 6, with functional and defective
ELPV cells and several seeds. Writes book/data/results/mobilenet_cells.json, which
chapter 01 plots. Each run is saved when it is done, and runs that the file contains are
skipped, so an interrupted command can be resumed; `--force` repeats all runs.
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
    """Train a model; the seed determines split, weights, batch order and flips."""
    torch.manual_seed(seed)
    model = MobileNetV1(num_classes=2, **MODELS[name]).to(
        memory_format=torch.channels_last
    )
    groups = parameter_groups(model, WEIGHT_DECAY)
    optimizer = torch.optim.RMSprop(groups, lr=LEARNING_RATE, alpha=0.9, momentum=0.9)
    # Processor time, because other processes hardly affect it, unlike wall time.
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
    """Run the missing combinations of model and seed."""
    stored = results.Results(__file__, RECIPE, force=results.forced(__doc__, arguments))
    done = {(row["model"], row["seed"]) for row in stored.runs}
    cells = elpv()
    for seed in range(SEEDS):
        split = split_cells(cells, side=SIDE, seed=seed)
        for name in MODELS:
            if (name, seed) in done:
                continue
            row = run(name, seed, split)
            stored.runs.append(row)
            stored.save()
            print(
                f"seed {seed}, {name}: accuracy {row['accuracy']:.3f}, AUROC"
                f" {row['auroc']:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
