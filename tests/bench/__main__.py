"""Compare the speed of paperlib with that of its peers.

`python tests/bench` runs all benchmarks at small sizes, `--full` at large ones; names
select benchmarks, and `--device cuda` runs them on a GPU. Each runs in its own process.
The rows are printed as a table and written to book/data/speed.json (on a GPU
speed_gpu.json), from which book/speed.md is built.
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
# Seconds per part after which no turn begins, except for the first three.
BUDGET = {"quick": 1.0, "full": 60.0}
TURNS = {"quick": 5, "full": 15}


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument(
        "benches",
        nargs="*",
        help=f"from {', '.join(BENCHES)} (default: all); a selection is printed only",
    )
    flags.add_argument(
        "--full", action="store_true", help="larger sizes, more turns, and the curves"
    )
    flags.add_argument("--curves", action="store_true", help="only the curves")
    flags.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    flags.add_argument(
        "--threads",
        type=int,
        default=1,
        help="CPU threads (default 1, which other processes affect least)",
    )
    flags.add_argument("--child", help=argparse.SUPPRESS)
    return flags


def child(task: str, full: bool, device: torch.device) -> object:
    """Run the task of a child process: the rows of a benchmark, or a set of curves."""
    kind, _, name = task.partition(":")
    if kind == "curves":
        from scaling import CURVES

        return list(CURVES[name](device))
    machine = peak_of_machine(device)
    mode = "full" if full else "quick"
    bench_rows, missing = [], {}
    for part_name, build in importlib.import_module(f"bench_{name}").PARTS.items():
        part = build(full, device)
        for row in rows(part, TURNS[mode], BUDGET[mode], device):
            bench_rows.append({"bench": name, "part": part_name, **row})
        missing |= part.missing
    return {"rows": bench_rows, "missing": missing, "machine": machine._asdict()}


def run_child(task: str, options: argparse.Namespace) -> object:
    """Run a task in a child process and return its result."""
    threads = str(options.threads)
    # NumPy and faiss read these variables once, when they are imported.
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
    process = subprocess.run(
        [*command, *["--full"] * options.full],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if process.returncode:
        sys.exit(
            f"error: {task} failed with exit status {process.returncode};"
            " its messages are above"
        )
    return json.loads(process.stdout.splitlines()[-1])


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def format_number(value: float | None, digits: int = 3) -> str:
    return (
        ""
        if value is None
        else f"{value:,.{digits}g}"
        if value < 1000
        else f"{value:,.0f}"
    )


def table(bench_rows: list[dict], machine: dict) -> str:
    """Format the rows for a terminal: times in milliseconds, ratios to paperlib's."""
    lines = [
        f"{'':38} {'wall ms':>9} {'min to max':>17} {'CPU ms':>8} {'ratio':>6}"
        f" {'min to max':>13} {'floor':>6} {'peak MiB':>8} {'difference':>10}"
    ]
    heading = None
    for row in bench_rows:
        if row["what"] != heading:
            heading = row["what"]
            lines.append(heading)
        wall, low, high, cpu = (
            format_number(1e3 * row[key])
            for key in ("wall", "wall_low", "wall_high", "cpu")
        )
        ratios = f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}"
        bound = floor(row, machine)
        floor_ms = format_number(bound and 1e3 * bound)
        error = "" if row["difference"] is None else f"{row['difference']:.1e}"
        lines.append(
            f"  {row['contender']:36} {wall:>9} {f'{low} to {high}':>17} {cpu:>8}"
            f" {row['ratio']:6.2f} {ratios:>13} {floor_ms:>6}"
            f" {format_number(row['peak']):>8} {error:>10}  {row['note']}"
        )
    return "\n".join(lines)


def main() -> None:
    options = parser().parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "error: --device cuda needs a CUDA device, and PyTorch finds none;"
            " omit --device for the CPU"
        )
    torch.set_num_threads(options.threads)
    if options.child:
        print(json.dumps(child(options.child, options.full, device)))
        return
    unknown = set(options.benches) - set(BENCHES)
    if unknown:
        sys.exit(
            f"error: unknown benchmarks {', '.join(sorted(unknown))};"
            f" expected {', '.join(BENCHES)}"
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
        stamp, bench_rows = measure(options, device)
        if options.benches:
            return
        save(
            path,
            {
                "stamp": stamp | {"seconds": round(time.perf_counter() - start)},
                "rows": bench_rows,
            },
        )
    if options.curves or options.full:
        from scaling import CURVES

        # Each is saved when it is done, because all of them take long.
        for name in CURVES:
            print(f"curves of {name} …", flush=True, file=sys.stderr)
            points = run_child(f"curves:{name}", options)
            stored = read(path).get("curves", {})
            curve = {"stamp": make_stamp(options, device), "curves": points}
            save(path, {"curves": stored | {name: curve}})
    print(f"{path.relative_to(ROOT)} written, {time.perf_counter() - start:.0f} s")


def measure(
    options: argparse.Namespace, device: torch.device
) -> tuple[dict, list[dict]]:
    """Run the benchmarks, print their table, and return the stamp and the rows."""
    bench_rows, missing, machines = [], {}, []
    for name in options.benches or BENCHES:
        print(f"{name} …", flush=True, file=sys.stderr)
        result = run_child(f"rows:{name}", options)
        bench_rows += result["rows"]
        missing |= result["missing"]
        machines.append(result["machine"])
    fastest = max(machines, key=lambda machine: machine["macs_per_second"])
    print(table(bench_rows, fastest))
    print(
        "ratio: time over paperlib's, median over the turns (processor time on one"
        " thread of a CPU, else wall time); floor: ms\nfor the part's operations or"
        " bytes at this machine's measured peak; difference: norm, relative to"
        " paperlib's result."
    )
    for name, reason in missing.items():
        print(f"missing: {name}, {reason}")
    stamp = make_stamp(options, device) | {"missing": missing, "machine": fastest}
    return stamp, bench_rows


def make_stamp(options: argparse.Namespace, device: torch.device) -> dict:
    """Record the device, the date and the versions of a measurement."""
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


def save(path: Path, entries: dict) -> None:
    """Replace entries of a result file; the others are not changed."""
    write_text(path, json.dumps(read(path) | entries, indent=1) + "\n")


if __name__ == "__main__":
    main()
