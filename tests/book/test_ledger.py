"""The ledger: one row per item, and links that lead to existing places."""

import re
import shutil

import ledger
import pytest
from built import HTML, ROOT, why_not_built
from nbformat.v4 import new_code_cell

NOTEBOOK, FIGURE_3 = "notebooks/02_cam.ipynb", "ledger:cam-figure-3:measured"
ARXIV = {"1704.04861": "mobilenet", "2006.16067": "patch_svdd", "2011.08785": "padim"}


@pytest.fixture(scope="module")
def book_ledger():
    return ledger.collect(ROOT)


def test_the_ledger_has_no_problems(book_ledger):
    assert book_ledger.problems == []


def test_at_most_a_fifth_of_equations_and_algorithms_is_quoted_only(book_ledger):
    counted = [row.kind for row in book_ledger.rows if row.group in ("eq", "algorithm")]
    assert len(counted) == 35
    assert book_ledger.quoted_share() == counted.count("quoted") / len(counted) <= 0.2


def test_every_row_is_complete(book_ledger):
    for row in book_ledger.rows:
        assert row.kind in ledger.KINDS and row.group in ledger.GROUPS, row.item
        assert 3 <= len(row.entry["says"].split()) <= 8, row.entry["says"]
        assert set(row.entry) <= {
            *"says where number needs note quoted not_here".split()
        }, row.item
        assert row.entry.get("number") in (None, *ledger.NUMBERS), row.item
        if row.kind not in ledger.UNVERIFIED:
            assert row.marks, row.item


@pytest.mark.parametrize("group", ["eq", "algorithm", "table", "figure"])
def test_numbered_items_have_no_gap(book_ledger, group):
    """Figure 14 cannot exist without Figures 1 to 13, so each of them has a row."""
    for paper in book_ledger.papers:
        items = [
            row.item
            for row in book_ledger.rows
            if (row.paper, row.group) == (paper, group)
        ]
        numbers = sorted(
            int(item.partition("-")[2]) for item in items if item[-1].isdigit()
        )
        assert numbers == list(range(1, len(numbers) + 1)), paper


def test_verified_equations_and_algorithms_have_a_test(book_ledger):
    """A test or an asserting notebook cell verifies each of them."""
    for row in book_ledger.rows:
        if row.group in ("eq", "algorithm") and row.kind not in ledger.UNVERIFIED:
            assert row.tests or any(mark.asserts for mark in row.marks), (
                row.paper,
                row.item,
            )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "Howard, arXiv:1704.04861v1, Sec. 3.1, Eq. 2 (groups=1) and Eq. 4.",
            ["mobilenet-eq-2", "mobilenet-eq-4"],
        ),
        (
            "Patch SVDD, arXiv:2006.16067, Eq. 8-10 and Alg. 2.",
            [f"patch-svdd-{item}" for item in ("eq-8", "eq-9", "eq-10", "algorithm-2")],
        ),
        (
            "PaDiM, arXiv:2011.08785, Tables III, V and VI.",
            ["padim-table-3", "padim-table-5", "padim-table-6"],
        ),
        ("PaDiM, arXiv:2011.08785, Sec. V-A, Table I. ", ["padim-table-1"]),
        (
            "counts of arXiv:1704.04861v1 (Eq. 2, 4 and 5), for all.",
            [f"mobilenet-eq-{n}" for n in (2, 4, 5)],
        ),
        (
            "PaDiM, arXiv:2011.08785, Eq. 1; Chan et al., COMPSTAT 1982, Eq. 7;"
            " arXiv:1502.01852, Eq. 15",
            ["padim-eq-1"],
        ),
        (
            "He, arXiv:1502.01852, Eq. 15, then arXiv:2011.08785, Fig. 2 and Eq. 5",
            ["padim-figure-2", "padim-eq-5"],
        ),
        ("this book, Eq. 3", []),
        ("arXiv:2006.16067, Eq. 5 and Sec. 4", ["patch-svdd-eq-5"]),
    ],
)
def test_items_are_read_from_a_source(source, expected):
    assert ledger.named(source, ARXIV) == expected


def test_numerals():
    roman = {"I": "1", "IV": "4", "VIII": "8", "IX": "9", "12": "12"}
    assert {n: ledger._number(n) for n in roman} == roman


def test_items_are_read_from_facts():
    facts = {
        "table_1_a": {},
        "table_IV_b": {},
        "table_per_class": {},
        "a_table": {},
        "tables_in_paper": 8,
        "equations": {"items": [{"number": None}, {"number": 3}]},
        "equations_of_another_version": {"items": []},
        "algorithms": {"confidence": "", "1_train": []},
        "figures": {"figure_2": "", "note": "", "without_number": {"maps": ""}},
        "figures_in_paper": 2,
    }
    items = [
        *"table-1 table-4 table-per-class eq-3 algorithm-1 figure-2".split(),
        *"figure-maps".split(),
    ]
    assert ledger.known(facts) == items


# ---- errors are reported ----
@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of all files that the ledger reads, for tests that introduce errors."""
    root = tmp_path_factory.mktemp("copy")
    ignore = shutil.ignore_patterns("__pycache__", "*.safetensors", "api", "_static")
    for folder in ("book", "paperlib", "tests", "notebooks"):
        shutil.copytree(ROOT / folder, root / folder, ignore=ignore)
    assert ledger.collect(root).problems == []
    return root


def problems_after(copy, path, old, new):
    """Replace `old`, a pattern, in a file of the copy; return the reported problems."""
    text = (copy / path).read_text(encoding="utf-8")
    changed = re.sub(old, new, text)
    assert changed != text
    (copy / path).write_text(changed, encoding="utf-8")
    try:
        return "\n".join(ledger.collect(copy).problems)
    finally:
        (copy / path).write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("path", "old", "new", "message"),
    [
        (
            "book/data/items.yml",
            "    eq-12: {",
            "    eq-13: {",
            "gradcam.yml names gradcam-eq-12, which",
        ),
        (
            "book/data/padim.yml",
            "table_IV_stc:",
            "table_IX_stc:",
            "padim.yml names padim-table-9, which",
        ),
        (
            "paperlib/cam/maps.py",
            "arXiv:1512.04150, Eq. 2.",
            "arXiv:1512.04150, Eq. 7.",
            "_map names cam-eq-7",
        ),
        (
            "paperlib/cam/maps.py",
            "::test_the_map_is_the_weighted_sum",
            "::test_gone",
            "tests/cam/test_cam.py has no test_gone",
        ),
        (NOTEBOOK, FIGURE_3, "ledger:cam-figure-3:seen", "'seen' of cam-figure-3"),
        (NOTEBOOK, FIGURE_3, "other", "cam-figure-3 has no row"),
        (NOTEBOOK, FIGURE_3, "ledger:cam-figure-99:measured", "cam-figure-99, which"),
        (
            NOTEBOOK,
            FIGURE_3,
            "ledger:cam-figure-8:measured",
            "same of cam-figure-8 twice",
        ),
        (
            "book/02_cam.md",
            "(ledger:cam-table-4:quoted)=\n",
            "",
            "cam-table-4 is quoted only, but no page marks where",
        ),
        (
            "book/02_cam.md",
            "(ledger:cam-table-4:quoted)=",
            "(ledger:cam-table-4:measured)=",
            "it counts as measured",
        ),
        (
            "book/02_cam.md",
            "(ledger:cam-eq-2:by-hand)=",
            "(ledger:cam-figure-3:quoted)=",
            "",
        ),
        (
            "book/data/items.yml",
            "quoted: needs the ShanghaiTech Campus videos",
            "note: x",
            "items.yml must say why",
        ),
    ],
)
def test_an_error_is_reported(copy, path, old, new, message):
    problems = problems_after(copy, path, re.escape(old), new)
    assert message in problems and bool(problems) == bool(message), problems


def test_too_many_quoted_items_are_reported(book_ledger, monkeypatch):
    quoted = [
        row._replace(
            marks=[mark._replace(kind="quoted") for mark in row.marks], peers=[]
        )
        for row in book_ledger.rows
    ]
    few = [
        new if row.paper == "padim" else row
        for row, new in zip(book_ledger.rows, quoted, strict=True)
    ]
    many = [
        new if row.paper == "gradcam" else row
        for row, new in zip(book_ledger.rows, quoted, strict=True)
    ]
    assert [
        book_ledger._replace(rows=rows).quoted_share() for rows in (few, many, quoted)
    ] == [2 / 35, 12 / 35, 1]
    monkeypatch.setattr(ledger, "QUOTED_SHARE", -0.1)
    assert (
        "0% of equations and algorithms are quoted only; at most -10% may be"
        in ledger.collect(ROOT).problems
    )


def test_cells_with_assertions_are_recognised():
    assert ledger._asserts("x = 1\nassert x")
    assert ledger._asserts("np.testing.assert_allclose(a, b)")
    assert not ledger._asserts("print('assert')")


def test_checks_in_hidden_cells_count():
    shown, hidden, later = (new_code_cell(source) for source in ("x = 1", "a", "b"))
    hidden.metadata.tags = ["remove-cell"]
    assert [*ledger._with_checks([shown, hidden, later])] == ["x = 1", "a"]
    assert [*ledger._with_checks([shown, later, hidden])] == ["x = 1"]


# ---- the built page ----
@pytest.fixture(scope="module")
def page():
    problem = why_not_built()
    assert not problem, problem
    html = (HTML / "book" / "ledger.html").read_text(encoding="utf-8")
    return html[html.index("<article") : html.index("</article>")]


def test_the_page_has_a_row_for_each_item(book_ledger, page):
    tables = re.findall(r'<table class="ledger table">.*?</table>', page, flags=re.S)
    assert len(tables) == len(book_ledger.papers) == 5
    for paper, table in zip(book_ledger.papers, tables, strict=True):
        rows = re.findall(
            r"<tr class=.*?</tr>", table[table.index("<tbody") :], flags=re.S
        )
        assert len(rows) == sum(row.paper == paper for row in book_ledger.rows), paper


def test_the_summary_counts_every_row_once(book_ledger, page):
    (summary,) = re.findall(
        r'<table class="ledger-summary table">.*?</table>', page, flags=re.S
    )
    last = [int(number) for number in re.findall(r"<strong>(\d+)</strong>", summary)]
    not_repeated = sum(
        row.group == "table" and "needs" in row.entry for row in book_ledger.rows
    )
    assert last[-1] == not_repeated > 0 and sum(last) == len(book_ledger.rows)
    for row in re.findall(
        r"<tr.*?</tr>", summary[summary.index("<tbody") :], flags=re.S
    ):
        assert re.search(r"\d", re.sub(r"<[^>]+>", "", row)), "a row without a number"
    assert f"{len(book_ledger.rows)} items" in page
    for kind, sentence in ledger.KINDS.values():
        meaning = rf"<strong>{kind}</strong>: {re.escape(sentence[:20])}"
        assert re.search(meaning, page.replace("’", "'")), kind


def test_links_lead_to_the_place_the_source_and_the_test(book_ledger, page):
    """Each link's anchor exists; each mark and each function's source has a link."""
    links = set(re.findall(r'href="([^"#]+)#([^"]+)"', page))
    assert len(links) > 200
    ids = {}
    for address, anchor in links:
        path = (HTML / "book" / address).resolve()
        if path not in ids:
            ids[path] = set(
                re.findall(r'id="([^"]+)"', path.read_text(encoding="utf-8"))
            )
        assert anchor in ids[path], f"{address}#{anchor}"
    for row in book_ledger.rows:
        for mark in row.marks:
            assert (f"../{mark.page}.html", mark.anchor) in links
        for function in row.functions:
            inner = function.name.removeprefix(f"{function.module}.")
            assert (
                f"../_modules/{function.module.replace('.', '/')}.html",
                inner,
            ) in links


def test_the_page_contains_every_test_of_the_ledger(book_ledger, page):
    html = (HTML / "book" / "ledger" / "tests.html").read_text(encoding="utf-8")
    tests = {test for row in book_ledger.rows for test in row.tests}
    assert len(tests) > 15
    for file, name in tests:
        code = html[html.index(f'id="{ledger._test_anchor(file, name)}"') :]
        listing = re.sub(r"<[^>]+>", "", code[: code.index("</pre>")])
        line = ledger._line_of_test(ROOT, file, name)
        assert re.search(rf"^ *{line} ?def {name}\(", listing, flags=re.M), name


def test_peers_are_the_libraries_that_a_test_compares_with(book_ledger):
    peers = {f"{row.paper}-{row.item}": row.peers for row in book_ledger.rows}
    assert peers["gradcam-eq-1"] == ["captum"]
    assert ledger.peers(
        ROOT / "tests" / "test_metrics.py", "test_auroc_equals_scikit_learn"
    ) == ["scikit-learn"]
    # Helpers of the same file count; libraries that only provide networks or images do
    # not.
    assert ledger.peers(
        ROOT / "tests" / "complexity" / "test_complexity.py",
        "test_agrees_with_flop_counter",
    ) == ["PyTorch's counter"]
    name = "test_maps_average_to_the_logits_of_many_networks"
    assert ledger.peers(ROOT / "tests" / "cam" / "test_cam.py", name) == []
