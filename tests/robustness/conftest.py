"""Count what the robustness tests put up with, and print it as a table: kind of fault,
cases, survived, lost.
"""

import pytest

PROPERTY = "robustness"


class Cases:
    """How many cases of one kind of fault a test has come through; a case that fails
    ends the test and is lost.
    """

    def __init__(self, kind: str):
        self.kind, self.survived = kind, 0

    def survive(self, number: int = 1) -> None:
        self.survived += number


@pytest.fixture
def cases(request):
    """Give a counter for a kind of fault: `survived = cases("files: truncated")`, then
    `survived.survive()` a case.
    """

    def count(kind: str) -> Cases:
        return counters.setdefault(kind, Cases(kind))

    counters: dict[str, Cases] = {}
    yield count
    # Properties travel with the report from a process of pytest-xdist.
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
    whole = [sum(row[i] for row in table.values()) for i in (0, 1)]
    terminalreporter.line(
        f"{'together':{width}}  {sum(whole):7,}  {whole[0]:8,}  {whole[1]:4}"
    )


# Test → its counts: on the report of its teardown, which pytest keeps nowhere.
FINISHED: dict[str, list] = {}


def pytest_runtest_logreport(report):
    if report.when == "teardown":
        found = [value for name, value in report.user_properties if name == PROPERTY]
        if found:
            FINISHED[report.nodeid] = found
