"""Run tests on the other Pythons that this machine has, and on the older SQLAlchemy.

    python tests/matrix.py tests/test_outcome.py ...

Pythons are looked for in PATH and among pyenv's versions.  Each gets an environment of its own,
`.venv-3.13` for instance, and the first of them the oldest supported line of SQLAlchemy.  The
others run PostgreSQL 18, from a wheel, and leave the long tests out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PYTHONS = ["3.11", "3.12", "3.13"]
OLDEST_SQLALCHEMY = "SQLAlchemy==2.0.51"  # what setup.py asks for
NEWEST_SQLALCHEMY = "SQLAlchemy>=2.1"
OWN = "{}.{}".format(*sys.version_info)


def main(tests: list[str]) -> None:
    others = {version: find(version) for version in PYTHONS if version != OWN}
    found = {version: python for version, python in others.items() if python is not None}
    for version in others.keys() - found.keys():
        print(f"left out, no Python {version} here")
    requirement, postgresql = OLDEST_SQLALCHEMY, "machine"
    for version, python in (found or {OWN: sys.executable}).items():
        run(version, python, requirement, postgresql, tests)
        requirement, postgresql = NEWEST_SQLALCHEMY, "wheel"


def find(version: str) -> str | None:
    """Return a Python of *version* that runs, if there is one."""
    major, minor = version.split(".")
    check = f"import sys, ensurepip; sys.exit(sys.version_info[:2] != ({major}, {minor}))"
    for python in candidates(version):
        if subprocess.run([python, "-c", check], capture_output=True).returncode == 0:
            return python
    return None


def candidates(version: str) -> Iterator[str]:
    in_path = shutil.which(f"python{version}")
    if in_path is not None:
        yield in_path
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for python in sorted(pyenv.glob(f"versions/{version}.*/bin/python")):
        yield str(python)


def run(version: str, python: str, requirement: str, postgresql: str, tests: list[str]) -> None:
    folder = Path(f".venv-{version}")
    print(
        f"Python {version}, {requirement}, PostgreSQL of the {postgresql}, in {folder}", flush=True
    )
    if not (folder / "bin" / "pip").exists():
        subprocess.run([python, "-m", "venv", folder], check=True)
    pip = [f"{folder}/bin/pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    subprocess.run([*pip, "--editable", ".[library-test]", requirement], check=True)
    pytest = [f"{folder}/bin/pytest", "-q", "--numprocesses", "4", "--dist", "loadgroup"]
    # What pip has not compiled the tests do, as far as they import it; they keep it.
    environ = {**os.environ, "POSTGRESQL": postgresql, "PYTHONDONTWRITEBYTECODE": ""}
    if requirement != OLDEST_SQLALCHEMY:
        pytest += ["-m", "not long"]
    subprocess.run([*pytest, *tests], env=environ, check=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
