"""Docstrings: examples that run, and what implements a paper names source and test."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
from test_package import NAMES

import paperlib

TESTS = {path.name: path for path in Path(__file__).parent.rglob("test_*.py")}
FIELDS = ("Source:", "Departures:", "Test:")
MODULES = [
    found.name
    for found in pkgutil.walk_packages(paperlib.__path__, "paperlib.")
    if found.name != "paperlib.__main__"
]
EXAMPLES = [
    pytest.param(test, id=test.name)
    for name in MODULES
    for test in doctest.DocTestFinder().find(importlib.import_module(name))
    if test.examples
]


def public_names():
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name, value in vars(module).items():
            if (
                getattr(value, "__module__", None) == module_name
                and not name.startswith("_")
                and (inspect.isfunction(value) or inspect.isclass(value))
            ):
                yield pytest.param(value, id=f"{module_name}.{name}")


@pytest.mark.parametrize("value", list(public_names()))
def test_implementations_of_papers_name_source_departures_and_test(value):
    text = inspect.getdoc(value)
    assert text, "it has no docstring"
    assert "Source: this book" not in text, "Source is for what implements a paper"
    fields = [field for field in FIELDS if field in text]
    if not fields:
        return
    assert fields == list(FIELDS)
    pinned = re.findall(r"(test_\w+\.py)::(test_\w+)", text.split("Test:")[-1])
    assert pinned, "Test: names no test, as test_module.py::test_name"
    for file, name in pinned:
        assert file in TESTS, f"there is no {file} below tests"
        assert re.search(
            rf"^def {name}\(", TESTS[file].read_text(encoding="utf-8"), flags=re.M
        ), f"{file} has no {name}"


def contract():
    for module, names in NAMES.items():
        if module == "exercises":
            continue
        for name in names.split():
            value = getattr(importlib.import_module(f"paperlib.{module}"), name)
            if not (inspect.isclass(value) and issubclass(value, tuple)):
                yield pytest.param(value, id=f"{module}.{name}")


@pytest.mark.parametrize("value", list(contract()))
def test_each_name_of_the_contract_has_an_example(value):
    assert ">>> " in inspect.getdoc(value)


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_print_what_they_show(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an example may save a file
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    runner = doctest.DocTestRunner(optionflags=options)
    printed: list[str] = []
    runner.run(example, out=printed.append)
    assert not runner.failures, "".join(printed)


def test_the_walk_finds_the_library():
    names = {param.id for param in public_names()}
    assert {
        "paperlib.complexity.counting.profile",
        "paperlib.mobilenet.network.MobileNetV1",
        "paperlib.metrics.auroc",
    } <= names
