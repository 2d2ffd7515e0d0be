"""lock.py [--upgrade]: pin every package of pyproject.toml's extras, with the hash of
each of its files.

Writes requirements/book.txt (the extra `book` and the build's own setuptools),
requirements/test.txt (what the extra `test` adds), requirements/headless.txt (the
OpenCV for a machine without a screen's libraries), and constraints.txt: the same
versions without hashes. The versions in constraints.txt stay unless pyproject.toml no
longer allows them; `--upgrade` takes the newest. uv resolves for every Python and
platform at once, and reads the hashes of a release's files from the index, so nothing
of the packages is downloaded. It lives in _build/lock, not in .venv.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
UV = "uv>=0.5"
# grad-cam asks for it beside opencv-python; but the two own the same files, so an
# environment gets one of them.
HEADLESS = "opencv-python-headless"
LOCKS = {
    "book": "Every package of the extra `book`",
    "test": "What the extra `test` adds to book.txt",
    "headless": "In place of opencv-python where its windows can't be had",
}


def split(compiled: str) -> dict[str, str]:
    """Cut a requirements file into its blocks: name → the pin, its marker and its
    hashes.

    Raises:
        ValueError: a package has two pins, so one Python would be tested with another
            version than the next.
    """
    blocks: dict[str, str] = {}
    for block in re.split(r"^(?=\S)", compiled, flags=re.M):
        if not block.strip() or block.startswith("#"):
            continue
        name = block.partition("==")[0]
        if name in blocks:
            raise ValueError(
                f"{name} got two pins; expected one for every Python. Give it a bound"
                " in pyproject.toml"
            )
        if "--hash=sha256:" not in block:
            raise ValueError(f"{name} came without a hash: {block.strip()!r}")
        blocks[name] = block
    return blocks


def pins(blocks: dict[str, str]) -> dict[str, str]:
    """Read the versions: name → version."""
    return {
        name: re.match(r"[^=]+==([^\s;\\]+)", block)[1]
        for name, block in blocks.items()
    }


def resolve(extra: str, kept: str) -> dict[str, str]:
    """Let uv pin one extra, the build's own requirements and the headless OpenCV, as in
    the text `kept` if it can.
    """
    folder = ROOT / "_build" / "lock"
    uv = folder / "bin" / "uv"
    if not uv.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run(
            [folder / "bin" / "python", "-m", "pip", "install", "-q", UV], check=True
        )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    oldest = project["project"]["requires-python"].removeprefix(">=")
    # uv keeps the versions that it finds in the file it is to write.
    output = folder / f"{extra}.txt"
    output.write_text(kept, encoding="utf-8")
    # The system's certificates, as pip has them; "fewest": one version for all Pythons.
    options = [
        "--quiet",
        "--native-tls",
        "--universal",
        "--python-version",
        oldest,
        "--fork-strategy",
        "fewest",
    ]
    options += [
        "--generate-hashes",
        "--no-header",
        "--no-annotate",
        "--output-file",
        output,
    ]
    subprocess.run(
        [uv, "pip", "compile", *options, "--extra", extra, "pyproject.toml", "-"],
        cwd=ROOT,
        input="\n".join([*project["build-system"]["requires"], HEADLESS]),
        text=True,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return split(output.read_text(encoding="utf-8"))


def main(*arguments: str) -> None:
    """Write the three locks and constraints.txt."""
    unknown = set(arguments) - {"--upgrade"}
    if unknown:
        raise ValueError(
            f"unknown: {' '.join(sorted(unknown))}; expected nothing or --upgrade"
        )
    constraints = ROOT / "constraints.txt"
    every = resolve(
        "test", "" if arguments else constraints.read_text(encoding="utf-8")
    )
    pinned = "".join(f"{name}=={version}\n" for name, version in pins(every).items())
    book = resolve("book", pinned).keys() - {HEADLESS}
    shares = {
        "book": book,
        "headless": {HEADLESS},
        "test": every.keys() - book - {HEADLESS},
    }
    for lock, what in LOCKS.items():
        text = (
            f"# {what}. `make lock` wrote this; `make` installs it with"
            " --require-hashes --no-deps.\n"
        )
        text += "".join(block for name, block in every.items() if name in shares[lock])
        (ROOT / "requirements" / f"{lock}.txt").write_text(text, encoding="utf-8")
        print(
            f"requirements/{lock}.txt: {len(shares[lock])} packages,"
            f" {text.count('--hash=')} hashes"
        )
    said = (
        "# The versions that the book is tested with, without the hashes of"
        " requirements/. `make lock` wrote this.\n"
    )
    constraints.write_text(said + pinned, encoding="utf-8")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ValueError as error:
        sys.exit(f"lock.py: {error}")
