"""Run a notebook as Colab would; a program for the environment with Colab's versions
(see test_colab_long.py).

    python colab_kernel.py NOTEBOOK FOLDER PLAN

PLAN is JSON: `sessions`, a list of kernels to start one after the other in FOLDER, each
a list of steps. A step has `cells`, the numbers of the cells to run in order; `edit`, a
cell's number → its source from now on; `interrupt`, the pattern of a file upon whose
appearance the step is interrupted; `ask`, code whose printed text is the answer.
Written to standard output is JSON again: for each step its seconds, the cells' printed
texts, what they wrote to stderr, the error that ended the step, and the answer.
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
    """Press Colab's stop button once a file is there."""
    while not finished.wait(0.05):
        if any(folder.glob(pattern)):
            os.kill(client.km.provisioner.pid, signal.SIGINT)
            return


def run_step(client, step, folder):
    """Run one step in a kernel that is up."""
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
        for stream, kept in (("stdout", "printed"), ("stderr", "stderr")):
            text = "".join(
                output.text for output in outputs if output.get("name") == stream
            )
            if text:
                result[kept][number] = text
        if result["error"]:
            break
    finished.set()
    result["seconds"] = round(time.monotonic() - begin, 1)
    if "ask" in step:
        asked = nbformat.v4.new_code_cell(step["ask"])
        cells.append(asked)
        client.execute_cell(asked, len(cells) - 1)
        cells.pop()
        result["answer"] = "".join(output.get("text", "") for output in asked.outputs)
    return result


def main(path, folder, plan):
    """Run the plan."""
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
