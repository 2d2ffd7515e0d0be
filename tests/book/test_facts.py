"""The numbers that pages, notebooks and library quote from a paper are in book/data."""

import ast
import json
import re

import nbformat
import pytest
import yaml
from built import NOTEBOOKS, ROOT

PAPERS = {
    "01_mobilenet": "mobilenet",
    "02_cam": "cam",
    "03_gradcam": "gradcam",
    "04_patch_svdd": "patch_svdd",
    "05_padim": "padim",
}
NO_NUMBERS = re.compile(
    r"\{cite.*?`.*?`|\$.*?\$"  # citations, formulas
    r"|[A-Za-z]+[\w*-]*\d[\w-]*"  # names such as VGG-16
    r"|\d+(?:\.\d+)? MobileNet\S*"  # 0.75 MobileNet-192
    r"|\d+×\S+|\(.*?\)"  # sizes, remarks in brackets
)
every_paper = pytest.mark.parametrize(
    ("chapter", "paper"), PAPERS.items(), ids=PAPERS.values()
)


def facts(paper):
    return yaml.safe_load(
        (ROOT / "book" / "data" / f"{paper}.yml").read_text(encoding="utf-8")
    )


def printable(node, key=""):
    """List the numbers that may be quoted: all except those marked `memory`."""
    if isinstance(node, dict):
        if str(node.get("confidence", "")).startswith("memory"):
            return set()
        return {
            number for name, value in node.items() for number in printable(value, name)
        }
    if isinstance(node, list):
        return {number for value in node for number in printable(value)}
    if isinstance(node, bool) or node is None:
        return set()
    if isinstance(node, int | float):
        return {float(node)}
    return set(numbers(node))


def numbers(text):
    return [
        float(number.replace(",", ""))
        for number in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?![\w.]*\d)", text)
    ]


def quoted_tables(text):
    """List the rows of Markdown tables in the section on the paper's experiments."""
    experiments = text.split("## What the experiments show")[1].split("\n## ")[0]
    return [
        line
        for line in experiments.splitlines()
        if line.startswith("|") and not line.startswith("|---")
    ]


@every_paper
def test_every_file_names_its_sources(chapter, paper):
    data = facts(paper)
    assert data["paper"]["arxiv"] and data["sources"]
    text = (ROOT / "book" / "data" / f"{paper}.yml").read_text(encoding="utf-8")
    for key, value in data.items():
        if isinstance(value, dict) and (
            key.startswith(("table_", "figures")) or key == "equations"
        ):
            has_source = re.search(
                rf"^{key}:\n(?:[ -].*\n)*?.*(?:source|confidence)", text, flags=re.M
            )
            assert has_source, f"{key} has neither a source nor a confidence"


@every_paper
def test_the_tables_of_a_page_contain_only_numbers_of_the_papers(chapter, paper):
    known = printable(facts(paper)) | printable(
        facts("patch_svdd" if paper == "padim" else paper)
    )
    rows = quoted_tables((ROOT / "book" / f"{chapter}.md").read_text(encoding="utf-8"))
    assert len(rows) > 10
    unknown = {}
    for row in rows:
        printed = [
            n for cell in row.split("|")[2:] for n in numbers(NO_NUMBERS.sub("", cell))
        ]
        # The paper prints fractions; later papers quote them as percentages.
        if paper == "patch_svdd":
            printed = [n for n in printed if round(n / 100, 3) not in known]
        if numbers_of_row := set(printed) - known:
            unknown[row] = numbers_of_row
    assert unknown == {}


QUOTED = re.compile(r"^(?:QUOTED\w*|TABLE\d|PAPER|RIVALS|SPADE_AUROC)$")


def quoted_constants(path):
    """Yield the name and the numbers of each constant that quotes a paper."""
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            for node in ast.parse(cell.source).body:
                if isinstance(node, ast.Assign) and QUOTED.match(
                    getattr(node.targets[0], "id", "")
                ):
                    values = [
                        n.value
                        for n in ast.walk(node.value)
                        if isinstance(n, ast.Constant)
                    ]
                    yield (
                        node.targets[0].id,
                        {
                            float(v)
                            for v in values
                            if isinstance(v, int | float) and not isinstance(v, bool)
                        },
                    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_constants_of_a_notebook_agree_with_the_facts(path):
    known = printable(facts(PAPERS[path.stem])) | {0.0, 1.0, 2.0, 3.0, 9.0}
    for name, values in quoted_constants(path):
        assert values - known == set(), name


def test_constants_are_found():
    names = {name for path in NOTEBOOKS for name, _ in quoted_constants(path)}
    assert {"QUOTED", "TABLE2", "TABLE3", "PAPER", "RIVALS"} <= names


def test_the_librarys_tables_of_padim_agree_with_the_facts():
    ours = json.loads(
        (ROOT / "paperlib" / "padim" / "paper.json").read_text(encoding="utf-8")
    )
    data = facts("padim")
    columns = {
        "PaDiM-R18-Rd100": "padim_r18_rd100",
        "PaDiM-WR50-Rd550": "padim_wr50_rd550",
    }
    for name, column in columns.items():
        third = {
            key: row[column]
            for key, row in data["table_III_localization"]["rows"].items()
        }
        assert ours["table_III"][name] == third
    for table, source in (
        ("table_V", "table_V_detection"),
        ("table_VI", "table_VI_rd_mvtec"),
    ):
        columns = data[source]["columns"]
        for name, means in ours[table].items():
            (index,) = [
                i
                for i, column in enumerate(columns)
                if name in (column, column.replace(" EfficientNet", "-EfficientNet"))
            ]
            assert means == {
                key: row[index]
                for key, row in data[source]["rows"].items()
                if key in means
            }, (table, name)
