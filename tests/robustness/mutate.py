"""Do the tests test? Break the library's arithmetic, one line after another, and list
what no test notices.

    python tests/robustness/mutate.py [MODULE ...] [--most 40] [--seed 0]

Each line that computes or compares is changed once (an operator exchanged for another,
or a number for the next), in a copy of the repository; then the module's own tests run
until the first fails. A change that passes is a survivor: a test is missing, or the
change makes no difference that a test could see.
"""

import argparse
import ast
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Module → its tests, the fastest telling first.
TESTS = {
    "anomaly_map": "test_anomaly_map.py",
    "patch_svdd/pairs": "patch_svdd/test_pairs.py",
    "patch_svdd/images": "patch_svdd/test_pairs.py",
    "neighbors": "test_neighbors.py",
    "metrics": "test_metrics.py",
    "padim/gaussian": "padim/test_gaussian.py",
    "padim/detector": "padim/test_padim.py",
    "padim/evaluation": "padim/test_evaluation.py",
    "padim/inspection": "padim/test_inspection.py",
    "padim/report": "padim/test_inspection.py",
    "gradcam/maps": "gradcam/test_gradcam.py",
    "gradcam/guided": "gradcam/test_gradcam.py",
    "cam/maps": "cam/test_cam.py",
    "cam/head": "cam/test_cam.py",
    "cam/boxes": "cam/test_cam.py",
    "complexity/counting": "complexity/test_complexity.py complexity/test_inputs.py",
    "complexity/recorder": "complexity/test_complexity.py complexity/test_inputs.py",
    "complexity/values": "complexity/test_inputs.py",
    "complexity/formulas": "complexity/test_complexity.py",
    "storage": "test_storage.py test_checkpoint.py",
    "runtime": "test_runtime.py test_notebook_runtime.py",
    "patch_svdd/encoders": "patch_svdd/test_encoders.py",
    "patch_svdd/losses": "patch_svdd/test_patch_training.py",
    "patch_svdd/training": "patch_svdd/test_patch_training.py",
    "patch_svdd/detector": "patch_svdd/test_patch_svdd.py",
    "datasets/folders": "datasets/test_folders.py",
    "datasets/archive": "datasets/test_archive.py",
    "datasets/synthetic": "datasets/test_synthetic.py",
    "mobilenet/network": "mobilenet/test_mobilenet.py",
    "activations": "test_activations.py",
    "guided_relu": "test_activations.py",
    "inference": "test_activations.py",
}
OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.MatMult: ast.Add,
}
# for the tests of one change; a change that makes them hang is noticed, too
SECONDS = 120


def changes(source: str) -> list[tuple[int, str, str]]:
    """List (line, what was changed, changed source): every operator and number outside
    annotations and messages.
    """
    tree = ast.parse(source)
    found = []
    for node in _arithmetic(tree):
        if isinstance(node, ast.Compare):
            before = node.ops[0]
            node.ops[0] = OPERATORS[type(before)]()
            found.append(
                (
                    node.lineno,
                    f"{_sign(before)} → {_sign(node.ops[0])}",
                    ast.unparse(tree),
                )
            )
            node.ops[0] = before
        elif isinstance(node, ast.Constant):
            before = node.value
            node.value = before + 1
            found.append((node.lineno, f"{before} → {node.value}", ast.unparse(tree)))
            node.value = before
        else:
            before = node.op
            node.op = OPERATORS[type(before)]()
            found.append(
                (node.lineno, f"{_sign(before)} → {_sign(node.op)}", ast.unparse(tree))
            )
            node.op = before
    return found


def _arithmetic(tree: ast.AST) -> list[ast.AST]:
    skipped: set[int] = set()
    for node in ast.walk(tree):
        hidden: list[ast.AST | None] = []
        if isinstance(node, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom):
            hidden = [node]
        elif isinstance(node, ast.FunctionDef):
            hidden = [node.returns, *node.decorator_list]
            hidden += [
                argument.annotation
                for argument in [*node.args.args, *node.args.kwonlyargs]
            ]
        elif isinstance(node, ast.AnnAssign):
            hidden = [node.annotation]
        elif isinstance(node, ast.ClassDef):
            hidden = [*node.bases, *node.decorator_list]
        skipped |= {
            id(inner) for part in hidden if part is not None for inner in ast.walk(part)
        }
    return [
        node
        for node in ast.walk(tree)
        if id(node) not in skipped
        and (
            isinstance(node, ast.BinOp | ast.AugAssign)
            and type(node.op) in OPERATORS
            or isinstance(node, ast.Compare)
            and type(node.ops[0]) in OPERATORS
            or isinstance(node, ast.Constant)
            and type(node.value) in (int, float)
        )
    ]


def _sign(operator: ast.AST) -> str:
    return type(operator).__name__


def one_a_line(source: str, rng: random.Random) -> list[tuple[int, str, str]]:
    """Choose one change for each line that has any, in the lines' order."""
    lines: dict[int, list] = {}
    for change in changes(source):
        lines.setdefault(change[0], []).append(change)
    return [rng.choice(lines[line]) for line in sorted(lines)]


def tests_pass(copy: Path, module: str) -> bool:
    """Run the module's tests in a forked process, which has torch and its peers
    imported already.
    """
    child = os.fork()
    if not child:
        os.setsid()
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        signal.alarm(SECONDS)
        os.chdir(copy)
        import pytest

        files = [str(copy / "tests" / name) for name in TESTS[module].split()]
        os._exit(
            int(
                pytest.main(
                    ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", *files]
                )
            )
        )
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="default: all")
    parser.add_argument(
        "--most", type=int, default=10**6, help="changes of a module, drawn by the seed"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    copy = Path(tempfile.mkdtemp(prefix="mutate-"))
    for name in ("paperlib", "tests", "pyproject.toml"):
        source, ignored = ROOT / name, shutil.ignore_patterns("__pycache__")
        (
            shutil.copytree(source, copy / name, ignore=ignored)
            if source.is_dir()
            else shutil.copy(source, copy / name)
        )
    sys.path[:] = [
        str(copy),
        str(copy / "tests"),
        *(path for path in sys.path if Path(path or ".").resolve() != ROOT),
    ]
    import cv2  # noqa: F401 (imported once, for all that are forked)
    import faiss  # noqa: F401
    import hypothesis  # noqa: F401
    import scipy.ndimage  # noqa: F401
    import sklearn.decomposition  # noqa: F401
    import timm  # noqa: F401
    import torch
    import torchvision  # noqa: F401

    torch.set_num_threads(1)
    tried = 0
    survivors = []
    for module in options.modules or TESTS:
        path = copy / "paperlib" / f"{module}.py"
        source = path.read_text(encoding="utf-8")
        path.write_text(ast.unparse(ast.parse(source)), encoding="utf-8")
        if not tests_pass(copy, module):
            print(f"{module}: its tests fail without any change", flush=True)
            return 1
        rng = random.Random(f"{module} {options.seed}")
        chosen = one_a_line(source, rng)
        if len(chosen) > options.most:
            chosen = sorted(rng.sample(chosen, options.most))
        begun, left = time.monotonic(), 0
        for line, what, changed in chosen:
            path.write_text(changed, encoding="utf-8")
            if tests_pass(copy, module):
                left += 1
                text = source.splitlines()[line - 1].strip()
                survivors.append(f"{module}.py:{line}  {what}  {text}")
                print(f"  survives: {survivors[-1]}", flush=True)
        path.write_text(source, encoding="utf-8")
        tried += len(chosen)
        seconds = time.monotonic() - begun
        print(
            f"{module}: {len(chosen)} lines broken, {len(chosen) - left} noticed,"
            f" {seconds:.0f} s",
            flush=True,
        )
    print(
        f"together: {tried} lines broken, {tried - len(survivors)} noticed,"
        f" {len(survivors)} survive"
    )
    shutil.rmtree(copy)
    return 0


if __name__ == "__main__":
    sys.exit(main())
