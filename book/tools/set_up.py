"""set_up.py VENV LOCK...: create a virtual environment with the packages of
requirements/LOCK.txt and paperlib.

Runs on the bare interpreter (nothing is installed yet), so it imports only the standard
library. pip installs uv, and uv installs everything else.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OLDEST = (3, 11)
# pip's option → uv's environment variable, and what separates several values there.
PIP_OPTIONS = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "cert": ("SSL_CERT_FILE", " "),
    "proxy": ("ALL_PROXY", " "),
    "timeout": ("UV_HTTP_TIMEOUT", " "),
    "default-timeout": ("UV_HTTP_TIMEOUT", " "),
}


def check_python(version: tuple[int, ...]) -> None:
    """Raise ValueError if `version` is older than pyproject.toml requires."""
    if version < OLDEST:
        received, expected = (".".join(map(str, v[:2])) for v in (version, OLDEST))
        raise ValueError(
            f"this is Python {received}; expected {expected} or newer. Run, for"
            " example, `make PYTHON=python3.12 book`"
        )


def uv_settings(pip_config: str) -> dict[str, str]:
    """Translate the output of `pip config list` into environment variables of uv, so
    that uv uses the package indexes and certificates that pip uses.
    """
    # Like pip, uv accepts a package from any of the indexes; the hashes are checked.
    settings = {"UV_SYSTEM_CERTS": "1", "UV_INDEX_STRATEGY": "unsafe-best-match"}
    for line in pip_config.splitlines():
        key, _, value = line.partition("=")
        section, _, option = key.rpartition(".")
        # pip lists its environment variables first, and they override its files.
        if section in (":env:", "global", "install") and option in PIP_OPTIONS:
            variable, separator = PIP_OPTIONS[option]
            words = ast.literal_eval(value).split()
            settings.setdefault(variable, separator.join(words))
    return settings


def uv_install(python: Path, *arguments: str | Path) -> None:
    """Run `uv pip install --no-deps` in the environment of `python`, with pip's
    settings.
    """
    pip_config = subprocess.run(
        [python, "-m", "pip", "config", "list"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    command = [python.with_name("uv"), "pip", "install", "--python", python]
    subprocess.run(
        [*command, "--quiet", "--no-deps", *arguments],
        check=True,
        env=uv_settings(pip_config) | os.environ,
    )


def install_locked(
    python: Path, *locks: str, options: tuple[str | Path, ...] = ()
) -> None:
    """Install exactly the packages of requirements/LOCK.txt. uv refuses a file whose
    hash is not listed there.
    """
    files = [
        word for lock in locks for word in ("-r", ROOT / "requirements" / f"{lock}.txt")
    ]
    # Compile now: where PYTHONDONTWRITEBYTECODE is set, Python would compile at every
    # import.
    uv_install(python, "--compile-bytecode", "--require-hashes", *options, *files)


def main(venv: str, *locks: str) -> None:
    """Create `venv` if it does not exist, and install."""
    check_python(sys.version_info)
    python = Path(venv).absolute() / "bin" / "python"
    if not python.with_name("uv").exists():
        print(
            f"setting up {venv} (a few minutes, about 7 GB on Linux: PyTorch brings its"
            " CUDA libraries)",
            flush=True,
        )
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    subprocess.run(
        [
            *(python, "-m", "pip", "install", "-q", "--disable-pip-version-check"),
            *("--require-hashes", "-r", ROOT / "requirements" / "uv.txt"),
        ],
        check=True,
    )
    install_locked(python, *locks)
    # Separate, since a folder has no hash; with the setuptools of the lock.
    uv_install(python, "--no-build-isolation", "--editable", ROOT)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ValueError as error:
        sys.exit(f"set_up.py: {error}")
    except subprocess.CalledProcessError as error:
        command = " ".join(map(str, error.cmd))
        sys.exit(
            f"set_up.py: this command failed, for the reason above: {command}\n"
            "Check that this machine reaches its package index. If the index serves"
            " files with other hashes, install the same versions without hashes:"
            " pip install -c constraints.txt -e '.[test]'"
        )
