"""Train MobileNets and their full-convolution twin on solar cells, over several seeds (`make results`).

Tables 4 and 6 of the MobileNet paper in miniature, on data that is here: functional against defective ELPV cells.
Writes paperlib/results/mobilenet_cells.json, which chapter 01 draws. Every finished run is written at once, and a run
that the file already holds is not repeated, so an interrupted command goes on where it stopped; `--force` starts over.
"""

import argparse
import datetime
import json
import statistics
import time
from pathlib import Path

import atomic
import torch
from freshness import code_hash
from nbformat.v4 import new_code_cell, new_notebook

from paperlib import runtime
from paperlib.classifier import predict, train_classifier
from paperlib.datasets import CellSplit, elpv, split_cells
from paperlib.metrics import auroc
from paperlib.mobilenet import MobileNetV1, parameter_groups

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "paperlib" / "results" / "mobilenet_cells.json"
SIDE, EPOCHS, SEEDS = 128, 12, 5
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 4e-5
MODELS = {
    "0.25 MobileNet": {"width": 0.25},
    "0.5 MobileNet": {"width": 0.5},
    "0.25 full convolution": {"width": 0.25, "separable": False},
}


def run(name: str, seed: int, cells: CellSplit) -> dict:
    """Train one model with one seed; the seed sets the split, the weights, the order and the flips."""
    torch.manual_seed(seed)
    model = MobileNetV1(num_classes=2, **MODELS[name]).to(memory_format=torch.channels_last)
    groups = parameter_groups(model, WEIGHT_DECAY)
    optimizer = torch.optim.RMSprop(groups, lr=LEARNING_RATE, alpha=0.9, momentum=0.9)
    # Processor time on one thread: unlike the wall clock it does not change with what else the machine does.
    readings = [time.process_time()]
    history = train_classifier(
        model, (cells.train, cells.train_labels), optimizer, epochs=EPOCHS, seed=seed,
        on_epoch=lambda epoch: readings.append(time.process_time()),
    )  # fmt: skip
    logits = predict(model, cells.test)
    return {
        "model": name,
        "arguments": MODELS[name],
        "seed": seed,
        "accuracy": float((logits.argmax(1) == cells.test_labels).float().mean()),
        "auroc": auroc(cells.test_labels, logits[:, 1] - logits[:, 0]),
        "loss": [round(epoch.loss, 4) for epoch in history],
        "cpu_seconds_per_epoch": statistics.median(b - a for a, b in zip(readings, readings[1:], strict=False)),
    }


def stamp() -> dict:
    """Say what made the runs: the code's hash, versions, device, date and recipe."""
    script = new_notebook(cells=[new_code_cell(Path(__file__).read_text(encoding="utf-8"))])
    return {
        "code": code_hash(script, ROOT),
        "versions": runtime.versions(),
        "device": runtime.device_name(torch.device("cpu")),
        "date": datetime.date.today().isoformat(),
        "recipe": {
            "side": SIDE, "epochs": EPOCHS, "batch": 32, "learning rate": LEARNING_RATE, "weight decay": WEIGHT_DECAY,
        },
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--force", action="store_true", help="repeat the runs that the file holds")
    options = parser.parse_args(arguments)
    old = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() and not options.force else {"stamp": {}}
    # Runs of other code or another recipe are not mixed with new ones.
    runs = old["runs"] if old["stamp"].get("code") == stamp()["code"] else []
    torch.set_num_threads(1)
    done = {(row["model"], row["seed"]) for row in runs}
    cells = elpv()
    for seed in range(SEEDS):
        split = split_cells(cells, side=SIDE, seed=seed)
        for name in MODELS:
            if (name, seed) in done:
                continue
            runs.append(run(name, seed, split))
            RESULT.parent.mkdir(exist_ok=True)
            atomic.write_text(RESULT, json.dumps({"stamp": stamp(), "runs": runs}, indent=1) + "\n")
            row = runs[-1]
            print(f"seed {seed}, {name}: accuracy {row['accuracy']:.3f}, AUROC {row['auroc']:.3f}", flush=True)


if __name__ == "__main__":
    main()
