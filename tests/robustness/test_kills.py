"""A run that is killed at any time can be resumed or restarted, with the same result.

Files are written atomically. The fast tests kill a few runs; `make test-long` kills
more than fifty, at random times.
"""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import killed_runs
import pytest
import small_mvtec
from safetensors.torch import load_file

from paperlib.padim import PaDiM

ROOT = Path(__file__).resolve().parents[2]
# Each run is forked from one process that has imported torch, so that a kill hits its
# work and not its imports.
PROCESSES = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module", autouse=True)
def forkserver():
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent), str(ROOT), before or ""]
    )
    PROCESSES.set_forkserver_preload(["killed_runs"])
    yield
    os.environ["PYTHONPATH"] = before or ""


def start(target, *arguments):
    process = PROCESSES.Process(target=target, args=arguments)
    process.start()
    return process


def kill(process):
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def finish(process):
    process.join()
    assert process.exitcode == 0


def outcome(name: str, folder: Path):
    """Return the result of a finished run, without times."""
    assert (folder / "end").exists()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    if name == "padim_over_categories":
        return [
            row.split(",")[:-2]
            for row in (folder / "results.csv").read_text().splitlines()
        ]
    found = load_file(folder / "weights.safetensors")
    return {key: value.tolist() for key, value in found.items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("kills")
    for number in range(6):
        texture = ("brick", "grass", "gravel")[number % 3]
        small_mvtec.write(root / "data", f"kind{number}", texture, 4, 2, 2)
    return root


def killed_again_and_again(name, root, kills, seed, counter):
    """Let a run go undisturbed, then the same one, killed `kills` times at random
    moments of what it has to do.
    """
    undisturbed, folder, done = root / "undisturbed", root / "killed", 0
    for _repetition in range(2):  # the first also loads what is loaded once
        shutil.rmtree(undisturbed, ignore_errors=True)
        undisturbed.mkdir()
        begun = time.monotonic()
        finish(start(killed_runs.run, name, undisturbed))
        seconds = time.monotonic() - begun
        truth = outcome(name, undisturbed)
    rng, moments = random.Random(f"{name} {seed}"), []
    while done < kills:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        # Of one run; then it is let go to its end.
        for _ in range(min(4, kills - done)):
            process = start(killed_runs.run, name, folder)
            process.join(seconds * rng.uniform(0, 0.6))
            written = (folder / "run.safetensors").exists() or (
                folder / "results.csv"
            ).exists()
            process.kill()
            process.join()
            if process.exitcode == 0:  # it had ended, if only just before the signal
                break
            assert process.exitcode == -signal.SIGKILL
            moments.append(written)
            done += 1
            counter.survive()
        finish(start(killed_runs.run, name, folder))
        assert outcome(name, folder) == truth
    shutil.rmtree(undisturbed)
    shutil.rmtree(folder)
    # Some of the kills hit a run that resumed a checkpoint.
    assert kills < 5 or any(moments)


@pytest.mark.parametrize(
    ("name", "length"), [("patch_svdd", 6), ("patch_svdd_as_published", 4)]
)
def test_a_training_killed_after_a_checkpoint_ends_like_an_undisturbed_one(
    tmp_path, cases, name, length
):
    for folder in (killed := tmp_path / "killed", undisturbed := tmp_path / "other"):
        folder.mkdir()
    finish(start(killed_runs.run, name, undisturbed, length))
    dies = killed_runs.kill_this_process  # at the first record, whatever the load
    process = start(killed_runs.run, name, killed, length, dies)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (killed / "run.safetensors").exists()
    assert not (killed / "weights.safetensors").exists()
    finish(start(killed_runs.run, name, killed, length))
    assert outcome(name, killed) == outcome(name, undisturbed)
    cases("kills: training and evaluation").survive()


def test_a_killed_evaluation_ends_like_an_undisturbed_one(root, cases):
    counter = cases("kills: training and evaluation")
    killed_again_and_again("padim_over_categories", root, 3, 0, counter)


@pytest.mark.long
@pytest.mark.parametrize("name", killed_runs.RUNS)
def test_runs_killed_at_random_end_like_undisturbed_ones(root, cases, name):
    killed_again_and_again(name, root, 12, 1, cases("kills: training and evaluation"))


# ---- saving ----


@pytest.mark.parametrize("kills", [5, pytest.param(30, marks=pytest.mark.long)])
def test_a_kill_while_saving_leaves_the_old_file_the_new_one_or_none(
    tmp_path, cases, kills
):
    counter, rng = cases("kills: while a model is saved"), random.Random(kills)
    path, ready, seen = tmp_path / "model.safetensors", tmp_path / "ready", set()
    extractor = killed_runs.padim(0).extractor
    for number in range(kills):
        if number % 5 == 4:
            path.unlink(missing_ok=True)  # now there is no old file
        process = start(killed_runs.save_for_ever, path)
        while not ready.exists():
            time.sleep(0.005)
            assert process.exitcode is None
        time.sleep(rng.uniform(0, 0.2))
        kill(process)
        ready.unlink()
        if path.exists():
            seen.add(PaDiM.load(path, extractor).epsilon)
        files = {entry.name for entry in tmp_path.iterdir()}
        assert files <= {path.name, f".{path.name}.tmp"}
        counter.survive()
    assert seen and seen <= {1.0, 2.0}


FULL = """
import resource, signal, sys, pathlib
sys.path[:0] = [{tests!r}]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import test_hostile_files as files
from paperlib.storage import write_text
path, limit = pathlib.Path(sys.argv[1]), int(sys.argv[2])
if path.name in files.KINDS:
    write = files.KINDS[path.name][0]
else:
    write = lambda p: write_text(p, "x" * 9000)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    write(path)
except Exception as error:
    print(type(error).__name__, error)
    sys.exit(3)
"""
SAVED = [
    *"padim.safetensors svdd.safetensors encoder.safetensors run.safetensors".split(),
    *"results.csv note.txt".split(),
]


# a process each; that a write which fails leaves the old file is tested in
# test_storage, too
@pytest.mark.long
@pytest.mark.parametrize("name", SAVED)
def test_a_full_disk_leaves_the_old_file_or_none(tmp_path, cases, name):
    """No more than `limit` bytes go to any file: the writing fails as on a full disk,
    with an error of the system.
    """
    code = FULL.format(tests=str(Path(__file__).parent))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    path, counter = tmp_path / name, cases("kills: full disk")

    def write(limit):
        arguments = [sys.executable, "-c", code, str(path), str(limit)]
        return subprocess.run(
            arguments, env=environment, capture_output=True, text=True
        )

    for old in (None, b"what was there before"):
        if old is not None:
            path.write_bytes(old)
        ran = write(700)
        assert ran.returncode == 3, ran.stdout + ran.stderr
        assert (path.read_bytes() if path.exists() else None) == old
        assert [entry.name for entry in tmp_path.iterdir()] == (
            [] if old is None else [name]
        )
        counter.survive()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    assert write(2**40 if unlimited < 0 else unlimited).returncode == 0
    assert path.stat().st_size > 700


# ---- make execute ----

CELLS = """# %% [markdown]
# A notebook of two cells.

# %%
import time
time.sleep(0.2)
print("first")

# %%
time.sleep(0.2)
print({number})
"""


# One kill at a chosen moment: test_freshness.test_a_killed_run_leaves_the_old_file.
@pytest.mark.long
def test_make_execute_killed_leaves_complete_notebooks(tmp_path, cases):
    """The end is that of an undisturbed run: same cells, outputs and code stamp."""
    kills = 15
    counter, rng = cases("kills: make execute"), random.Random(kills)
    (tmp_path / "notebooks" / "py").mkdir(parents=True)
    (tmp_path / "paperlib").mkdir()
    (tmp_path / "paperlib" / "__init__.py").touch()
    (tmp_path / "book").mkdir()
    for number in range(2):
        (tmp_path / "notebooks" / "py" / f"{number}_small.py").write_text(
            CELLS.format(number=number)
        )
    code = (
        "import sys, pathlib, run_notebooks as r; sys.exit(r.main([],"
        " pathlib.Path(sys.argv[1])))"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'book' / 'tools'}:{ROOT}"}

    def run():
        arguments = [sys.executable, "-c", code, str(tmp_path)]
        return subprocess.Popen(
            arguments,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def found():
        told = {}
        for path in sorted((tmp_path / "notebooks").glob("*.ipynb")):
            notebook = json.loads(path.read_text())
            outputs = [
                output["text"]
                for cell in notebook["cells"]
                for output in cell.get("outputs", [])
            ]
            told[path.stem] = (outputs, notebook["metadata"]["executed"]["code"])
        return told

    begun = time.monotonic()
    process = run()
    assert process.wait() == 0, process.stderr.read()
    seconds, truth = time.monotonic() - begun, found()
    assert [outputs for outputs, _ in truth.values()] == [
        [["first\n"], [f"{n}\n"]] for n in range(2)
    ]
    for number in range(kills):
        if number % 3 == 0:
            for path in (tmp_path / "notebooks").glob("*.ipynb"):
                path.unlink()
        process = run()
        try:
            process.wait(rng.uniform(0.2, 1) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            counter.survive()
        # Whole, or not there.
        assert all(found()[name] == truth[name] for name in found())
    process = run()
    assert process.wait() == 0 and found() == truth
    assert not list((tmp_path / "notebooks").glob(".*"))
