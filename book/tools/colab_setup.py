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

packages = {}  # import name → name on the package index
library = ""  # paperlib, zipped, as text

missing = [
    name
    for module, name in packages.items()
    if importlib.util.find_spec(module) is None
]
if missing:
    # What is installed stays as it is: replacing torch or numpy under a running
    # notebook breaks it. Of a package that lies in two folders the first is the one in
    # use; versions that pip does not understand can't be written down.
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
    print("installing", ", ".join(missing))
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "-c",
            str(constraints),
            *missing,
        ],
        check=True,
    )
    importlib.invalidate_caches()

if not any("paperlib-DIGEST" in folder for folder in sys.path):
    folder = tempfile.mkdtemp(prefix="paperlib-DIGEST-")
    zipfile.ZipFile(io.BytesIO(base64.b64decode(library))).extractall(folder)
    sys.path[:0] = [folder, str(Path(folder, "notebooks"))]
