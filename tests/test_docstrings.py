"""Every public function and class says where it comes from, what it departs in, and
which test pins it.
"""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import paperlib

TESTS = {path.name: path for path in Path(__file__).parent.rglob("test_*.py")}
FIELDS = ("Source:", "Departures:", "Test:")
# Figures and printed verdicts carry out no paper.
WITHOUT_SOURCE = {"paperlib.viz", "paperlib.exercises.verdict"}


def public_names():
    for found in pkgutil.walk_packages(paperlib.__path__, "paperlib."):
        module = importlib.import_module(found.name)
        if found.name in WITHOUT_SOURCE:
            continue
        for name, value in vars(module).items():
            own = getattr(
                value, "__module__", None
            ) == found.name and not name.startswith("_")
            plain_tuple = inspect.isclass(value) and issubclass(value, tuple)
            if (
                own
                and (inspect.isfunction(value) or inspect.isclass(value))
                and not plain_tuple
            ):
                yield pytest.param(value, id=f"{found.name}.{name}")


@pytest.mark.parametrize("value", list(public_names()))
def test_public_names_give_source_departures_and_test(value):
    text = inspect.getdoc(value) or ""
    missing = [field for field in FIELDS if field not in text]
    assert not missing, f"no {', '.join(missing)} in its docstring"
    pinned = re.findall(r"(test_\w+\.py)::(test_\w+)", text.split("Test:")[-1])
    assert pinned, "Test: names no test, as test_module.py::test_name"
    for file, name in pinned:
        assert file in TESTS, f"there is no {file} below tests"
        assert re.search(
            rf"^def {name}\(", TESTS[file].read_text(encoding="utf-8"), flags=re.M
        ), f"{file} has no {name}"


def test_the_walk_finds_the_library():
    names = {param.id for param in public_names()}
    assert {
        "paperlib.complexity.counting.profile",
        "paperlib.mobilenet.network.MobileNetV1",
        "paperlib.metrics.auroc",
    } <= names
