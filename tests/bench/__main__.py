"""Time paperlib beside its peers: `python tests/bench` (quick), `--full`,
`--device cuda`, or some benches by name.

Each bench runs in a process of its own, so that none disturbs the next. The rows go to
book/data/speed.json (on a GPU speed_gpu.json), from which book/speed.md is drawn, and
are printed as a table.
"""

import argparse
import datetime
import importlib
import json
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "book" / "tools")]
from measure import floor, peak_of_machine, rows  # noqa: E402

from paperlib import runtime  # noqa: E402
from paperlib.storage import write_text  # noqa: E402

BENCHES = ("complexity", "gradcam", "metrics", "padim", "pipeline", "patch_svdd")
PEERS = tuple("anomalib captum faiss-cpu fvcore grad-cam scikit-learn torchcam".split())
# Seconds of turns for each part, once there are three.
BUDGET = {"quick": 1.0, "full": 60.0}
TURNS = {"quick": 5, "full": 15}


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument(
        "benches",
        nargs="*",
        help=f"some of {', '.join(BENCHES)} (default: all); nothing is written",
    )
    found.add_argument(
        "--full", action="store_true", help="larger sizes, more turns, and the curves"
    )
    found.add_argument("--curves", action="store_true", help="the curves alone")
    found.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    found.add_argument(
        "--threads",
        type=int,
        default=1,
        help="of a CPU (default 1, which other work disturbs least)",
    )
    found.add_argument("--child", help=argparse.SUPPRESS)
    return found


def child(task: str, full: bool, device: torch.device) -> object:
    """Do one process's work: the rows of a bench, or the curves of a subject."""
    kind, _, rest = task.partition(":")
    if kind == "curves":
        from scaling import CURVES

        return list(CURVES[rest](device))
    machine = peak_of_machine(device)
    mode = "full" if full else "quick"
    found = []
    missing = {}
    for name, build in importlib.import_module(f"bench_{rest}").PARTS.items():
        part = build(full, device)
        for row in rows(part, TURNS[mode], BUDGET[mode], device):
            found.append({"bench": rest, "part": name, **row})
        missing |= part.missing
    return {"rows": found, "missing": missing, "machine": machine._asdict()}


def run_child(task: str, options: argparse.Namespace) -> object:
    """Run one task in a process of its own and read what it found."""
    threads = str(options.threads)
    # Before libraries load: numpy's and faiss's threads are set by these alone.
    env = os.environ | dict.fromkeys(
        ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads
    )
    command = [
        sys.executable,
        __file__,
        "--child",
        task,
        "--device",
        options.device,
        "--threads",
        threads,
    ]
    found = subprocess.run(
        [*command, *["--full"] * options.full],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if found.returncode:
        sys.exit(f"error: {task} ended with {found.returncode}; what it said is above")
    return json.loads(found.stdout.splitlines()[-1])


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def shown(value: float | None, digits: int = 3) -> str:
    return (
        ""
        if value is None
        else f"{value:,.{digits}g}"
        if value < 1000
        else f"{value:,.0f}"
    )


def table(found: list[dict], machine: dict) -> str:
    """Write the rows for a terminal: times in milliseconds, ratios to paperlib."""
    lines = [
        f"{'':38} {'wall ms':>9} {'min to max':>17} {'CPU ms':>8} {'ratio':>6}"
        f" {'min to max':>13} {'floor':>6} {'peak MiB':>8} {'difference':>10}"
    ]
    last = None
    for row in found:
        if row["what"] != last:
            last = row["what"]
            lines.append(last)
        spread = f"{shown(1e3 * row['wall_low'])} to {shown(1e3 * row['wall_high'])}"
        ratios = f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}"
        bound = floor(row, machine)
        least = shown(bound and 1e3 * bound)
        apart = "" if row["difference"] is None else f"{row['difference']:.1e}"
        lines.append(
            f"  {row['contender']:36} {shown(1e3 * row['wall']):>9} {spread:>17}"
            f" {shown(1e3 * row['cpu']):>8} {row['ratio']:6.2f} {ratios:>13} {least:>6}"
            f" {shown(row['peak']):>8} {apart:>10}  {row['note']}"
        )
    return "\n".join(lines)


def main() -> None:
    options = parser().parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "error: --device cuda, and there is no CUDA device here; leave --device out"
            " for the CPU"
        )
    torch.set_num_threads(options.threads)
    if options.child:
        print(json.dumps(child(options.child, options.full, device)))
        return
    unknown = set(options.benches) - set(BENCHES)
    if unknown:
        sys.exit(
            f"error: no bench {', '.join(sorted(unknown))}; there are"
            f" {', '.join(BENCHES)}"
        )

    start = time.perf_counter()
    path = (
        ROOT
        / "book"
        / "data"
        / ("speed_gpu.json" if device.type == "cuda" else "speed.json")
    )
    path.parent.mkdir(exist_ok=True)
    if not options.curves:
        stamp, found = measured(options, device)
        if options.benches:
            return
        save(
            path,
            {
                "stamp": stamp | {"seconds": round(time.perf_counter() - start)},
                "rows": found,
            },
        )
    if options.curves or options.full:
        from scaling import CURVES

        # Each is kept as soon as it is there: together they take a while.
        for name in CURVES:
            print(f"curves of {name} …", flush=True, file=sys.stderr)
            points = run_child(f"curves:{name}", options)
            old = read(path).get("curves", {})
            curve = {"stamp": stamped(options, device), "curves": points}
            save(path, {"curves": old | {name: curve}})
    print(f"{path.relative_to(ROOT)} written, {time.perf_counter() - start:.0f} s")


def measured(
    options: argparse.Namespace, device: torch.device
) -> tuple[dict, list[dict]]:
    """Run the benches one after the other, print their table, and give what stands in
    the file.
    """
    found, missing, machines = [], {}, []
    for name in options.benches or BENCHES:
        print(f"{name} …", flush=True, file=sys.stderr)
        got = run_child(f"rows:{name}", options)
        found += got["rows"]
        missing |= got["missing"]
        machines.append(got["machine"])
    best = max(machines, key=lambda machine: machine["macs_per_second"])
    print(table(found, best))
    print(
        "ratio: median over turns of time over paperlib's (processor time on one thread"
        " of a CPU, else wall time); floor: ms\nfor the part's operations and bytes at"
        " this machine's measured peak; difference: norm, over that of paperlib's"
        " result."
    )
    for name, why in missing.items():
        print(f"missing: {name}, {why}")
    return stamped(options, device) | {"missing": missing, "machine": best}, found


def stamped(options: argparse.Namespace, device: torch.device) -> dict:
    """Say where, when and with what something was measured."""
    return {
        "device": runtime.device_name(device),
        "threads": options.threads,
        "date": datetime.date.today().isoformat(),
        "mode": "full" if options.full else "quick",
        "versions": runtime.versions(),
        "peers": {name: version(name) for name in PEERS},
    }


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def save(path: Path, changed: dict) -> None:
    """Put what was measured into a file of figures, and leave the rest of it."""
    write_text(path, json.dumps(read(path) | changed, indent=1) + "\n")


if __name__ == "__main__":
    main()
