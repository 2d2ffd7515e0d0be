"""Count the cases of the robustness tests, and print a table per kind of fault."""

import pytest

PROPERTY = "robustness"


class Cases:
    """The number of cases of a kind of fault that a test has passed."""

    def __init__(self, kind: str):
        self.kind, self.survived = kind, 0

    def survive(self, number: int = 1) -> None:
        self.survived += number


@pytest.fixture
def cases(request):
    """Create counters: `counter = cases("files: truncated")`.

    The test calls `counter.survive()` per case.
    """

    def count(kind: str) -> Cases:
        return counters.setdefault(kind, Cases(kind))

    counters: dict[str, Cases] = {}
    yield count
    # pytest-xdist sends properties with the report to the main process.
    request.node.user_properties += [
        (PROPERTY, [c.kind, c.survived]) for c in counters.values()
    ]


def pytest_terminal_summary(terminalreporter):
    table: dict[str, list[int]] = {}
    failed = {report.nodeid for report in terminalreporter.stats.get("failed", [])}
    for test, counted in FINISHED.items():
        for number, (kind, survived) in enumerate(counted):
            row = table.setdefault(kind, [0, 0])
            row[0] += survived
            row[1] += test in failed and number == 0  # the case at which the test ended
    if not table:
        return
    terminalreporter.section("robustness")
    width = max(map(len, table))
    terminalreporter.line(
        f"{'kind of fault':{width}}  {'cases':>7}  {'survived':>8}  {'lost':>4}"
    )
    for kind, (survived, lost) in sorted(table.items()):
        terminalreporter.line(
            f"{kind:{width}}  {survived + lost:7,}  {survived:8,}  {lost:4}"
        )
    totals = [sum(row[i] for row in table.values()) for i in (0, 1)]
    terminalreporter.line(
        f"{'total':{width}}  {sum(totals):7,}  {totals[0]:8,}  {totals[1]:4}"
    )


# Test → its counts, from the reports of teardowns, which pytest does not store.
FINISHED: dict[str, list] = {}


def pytest_runtest_logreport(report):
    if report.when == "teardown":
        counts = [value for name, value in report.user_properties if name == PROPERTY]
        if counts:
            FINISHED[report.nodeid] = counts
