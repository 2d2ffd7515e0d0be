"""The import paths of the contract, the import order, and the time of an import."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import paperlib

# The names of the contract, by module.
NAMES = {
    "complexity": "conv2d_macs depthwise_separable_macs profile Profile",
    "mobilenet": "MobileNetV1 parameter_groups",
    "activations": "record_activations guided_relu",
    "cam": "class_activation_map cam CAM bounding_boxes Box",
    "gradcam": "grad_cam GradCAM guided_backprop guided_grad_cam",
    "anomaly_map": "upsample gaussian_blur spread_patch_scores minmax",
    "patch_svdd": (
        "PatchEncoder HierarchicalEncoder FlatEncoder PositionClassifier Embeddings"
        " load_released_weights svdd_loss position_loss train PatchSVDD PatchMaps"
    ),
    "neighbors": "nearest_distance greedy_coreset",
    "padim": "PatchGaussian mahalanobis_distance PaDiM",
    "backbones": "load Backbone FeatureExtractor concatenate_embeddings",
    "datasets": "elpv textures synthetic_defects MVTecAD folder Item",
    "metrics": "auroc pixel_auroc aupro best_threshold localization_error",
    "viz": "use_style",
    "exercises": "mobilenet cam gradcam patch_svdd padim",
    "runtime": "start",
}
PAPERS = {"cam", "complexity", "gradcam", "mobilenet", "padim", "patch_svdd"}


@pytest.mark.parametrize("module", NAMES)
def test_names_keep_their_import_paths(module):
    for name in NAMES[module].split():
        if module == "exercises":
            importlib.import_module(f"paperlib.exercises.{name}")
        else:
            assert hasattr(importlib.import_module(f"paperlib.{module}"), name), name


def test_the_names_that_most_users_need_come_from_the_top():
    assert set(paperlib.__all__) == {
        *("PaDiM", "PatchSVDD", "MobileNetV1", "profile"),
        *("grad_cam", "guided_backprop", "guided_grad_cam"),
        *("NotFitted", "UnusableFile"),
    }
    for name in paperlib.__all__:
        value = getattr(paperlib, name)
        home = importlib.import_module(".".join(value.__module__.split(".")[:2]))
        assert getattr(home, name) is value and name in dir(paperlib)


def test_modules_are_attributes_and_other_names_are_none():
    code = (
        "import paperlib; print(paperlib.padim.PaDiM.__name__,"
        " paperlib.cam.cam.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["PaDiM", "cam"], done.stderr
    for name in ("absent", "_absent"):
        with pytest.raises(AttributeError, match=f"has no attribute '{name}'"):
            getattr(paperlib, name)


def test_importing_the_package_loads_nothing_else():
    """So that it takes milliseconds; importing torch takes seconds."""
    code = (
        "import sys; before = set(sys.modules); import paperlib;"
        " print(*set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "paperlib" in loaded and not loaded & {
        "torch",
        "numpy",
        "timm",
        "jaxtyping",
    }, loaded


def imported_by(path):
    """The modules of the library that a file imports, as their first name."""
    import ast

    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            "paperlib"
        ):
            parts = node.module.split(".")
            yield from (
                [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
            )


def test_imports_run_from_papers_to_shared_ground():
    """Papers do not import one another, and what is shared imports no paper."""
    library = Path(paperlib.__file__).parent
    # The command line starts what papers offer; the exercises check what readers write
    # about them.
    entries = {"__init__", "__main__", "exercises"}
    for path in sorted(library.rglob("*.py")):
        own = path.relative_to(library).with_suffix("").parts[0]
        others = (set(imported_by(path)) & PAPERS) - {own}
        if own not in entries:
            assert not others, f"{path.relative_to(library)} imports {sorted(others)}"
