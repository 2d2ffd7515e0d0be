# @title Set-up: run this cell first. It unpacks paperlib and installs what is missing.
import base64
import importlib.util
import io
import re
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

packages = {}  # import name → name on the package index, with the oldest version
library = ""  # paperlib, zipped, as text

missing = [
    name
    for module, name in packages.items()
    if importlib.util.find_spec(module) is None
]
if missing:
    # What is installed is not replaced, because another torch or numpy under a running
    # notebook breaks it. Of a package in two folders, the first is the one in use;
    # versions that pip does not understand can't be constraints.
    installed = {}
    for found in metadata.distributions():
        if found.name and re.fullmatch(
            r"\d+(\.\d+)*((a|b|rc|\.post|\.dev)\d+)*(\+[\w.]+)?", found.version or ""
        ):
            installed.setdefault(
                re.sub(r"[-_.]+", "-", found.name).lower(), found.version
            )
    constraints = Path(tempfile.mkdtemp(), "constraints.txt")
    constraints.write_text(
        "".join(f"{name}=={version}\n" for name, version in installed.items())
    )
    print("Installing from the package index:", ", ".join(missing))
    pip = [sys.executable, "-m", "pip", "install", "-q", "-c", str(constraints)]
    done = subprocess.run([*pip, *missing], capture_output=True, text=True)
    if done.returncode:
        print(done.stdout, done.stderr)
        # What pip prints if no index answers; each of these packages is on the index.
        offline = re.search("[Cc]onnection|from versions: none", done.stderr)
        raise RuntimeError(
            "The package index can't be reached. This cell needs the internet to"
            f" install {', '.join(missing)}: connect, and run it again."
            if offline
            else "pip could not install the packages; its messages are printed above."
        )
    importlib.invalidate_caches()
else:
    print("All packages are installed.")


def leading_numbers(version):
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


outdated = []
for requirement in packages.values():
    name, _, oldest = requirement.partition(">=")
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:  # another package contains the module
        continue
    if leading_numbers(version) < leading_numbers(oldest):
        outdated.append(f"{name} {version} (needs {oldest})")
if outdated:
    print(
        f"Too old, so that some cells may fail: {', '.join(outdated)}. Upgrade with"
        " pip install --upgrade, and restart the kernel."
    )

folder = next((entry for entry in sys.path if "paperlib-DIGEST" in entry), None)
if folder is None:
    folder = tempfile.mkdtemp(prefix="paperlib-DIGEST-")
    archive = zipfile.ZipFile(io.BytesIO(base64.b64decode(library)))
    archive.extractall(folder)
    sys.path[:0] = [folder, str(Path(folder, "notebooks"))]
    n_files = len(archive.namelist())
    print(f"paperlib VERSION: {n_files} files, unpacked from this cell into {folder}")
else:
    print(f"paperlib VERSION is unpacked already, in {folder}")
