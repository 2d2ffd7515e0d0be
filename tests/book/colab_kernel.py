"""Run a notebook like Colab, in the environment of test_colab_long.py.

    python colab_kernel.py NOTEBOOK FOLDER PLAN

PLAN is JSON: `sessions`, a list of kernel sessions in FOLDER, each a list of steps. A
step has `cells`, the numbers of the cells to run in order; `edit`, new sources by cell
number; `interrupt`, the pattern of a file whose creation interrupts the step; `ask`,
code whose output is the answer. The program prints JSON: per step its seconds, the
output of the cells on stdout and stderr, the error that ended the step, and the answer.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

CELL_SECONDS = 1800


def interrupt_when(client, folder, pattern, finished):
    """Interrupt the kernel, like Colab's stop button, when a file exists."""
    while not finished.wait(0.05):
        if any(folder.glob(pattern)):
            os.kill(client.km.provisioner.pid, signal.SIGINT)
            return


def run_step(client, step, folder):
    """Run a step in a running kernel."""
    cells, begin = client.nb.cells, time.monotonic()
    for number, source in step.get("edit", {}).items():
        cells[int(number)].source = source
    result = {"printed": {}, "stderr": {}, "error": None, "answer": None}
    finished = threading.Event()
    if "interrupt" in step:
        threading.Thread(
            target=interrupt_when,
            args=(client, folder, step["interrupt"], finished),
            daemon=True,
        ).start()
    for number in step.get("cells", []):
        try:
            client.execute_cell(cells[number], number)
        except CellExecutionError as error:
            result["error"] = (
                f"cell {number}: {error.ename}:"
                f" {error.evalue}\n{error.traceback[-3000:]}"
            )
        outputs = cells[number].outputs
        for stream, key in (("stdout", "printed"), ("stderr", "stderr")):
            text = "".join(
                output.text for output in outputs if output.get("name") == stream
            )
            if text:
                result[key][number] = text
        if result["error"]:
            break
    finished.set()
    result["seconds"] = round(time.monotonic() - begin, 1)
    if "ask" in step:
        query = nbformat.v4.new_code_cell(step["ask"])
        cells.append(query)
        client.execute_cell(query, len(cells) - 1)
        cells.pop()
        result["answer"] = "".join(output.get("text", "") for output in query.outputs)
    return result


def main(path, folder, plan):
    """Run the plan; return the results of its steps."""
    folder, results = Path(folder), []
    for steps in plan["sessions"]:
        notebook = nbformat.read(path, as_version=4)
        client = NotebookClient(
            notebook,
            timeout=CELL_SECONDS,
            kernel_name="python3",
            allow_errors=False,
            resources={"metadata": {"path": str(folder)}},
        )
        with client.setup_kernel():
            for step in steps:
                results.append(run_step(client, step, folder))
    return results


if __name__ == "__main__":
    print("\n" + json.dumps(main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))))
