"""Runs other projects' own test suites twice: as they are, and with every application wrapped.

    .venv/bin/python tests/transparency_suites.py            the smaller suites
    .venv/bin/python tests/transparency_suites.py falcon     those that are named
    .venv/bin/python tests/transparency_suites.py --list     what there is

What passes without the middleware must pass with it: its promise is that any application
behaves as without it, to the letter.  `transparency_plugin.py` does the wrapping.

Each suite comes from its project's source distribution and runs in an environment of its own,
which is kept for the next time.  Nothing of it is part of this repository.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from time import monotonic

REPOSITORY = Path(__file__).resolve().parent.parent
WORK_DIR = REPOSITORY / "build" / "transparency"
PLUGIN = "transparency_plugin"
PYTEST = "pytest<9"
"""What the suites were written for: Flask's and Falcon's fail in part on pytest 9.2."""

PATIENCE = 1800.0
"""Seconds after which a run of a suite is given up."""

PATHS = f"""\
{REPOSITORY}
{REPOSITORY / "tests"}
import os; os.environ.get("TRANSPARENCY_SEAMS") and __import__("{PLUGIN}")
"""
"""A ``.pth`` file (https://docs.python.org/3/library/site.html): this repository comes last on
the path, and the plugin is also loaded into the servers that a suite starts as processes."""


@dataclass(frozen=True)
class Suite:
    """The tests of a project.

    :ivar needs: what they import, from the project's own list of requirements.
    :ivar seams: where they call applications; the keys of `transparency_plugin.PATCHES`.
    :ivar small: whether it is run when no suite is named.
    :ivar options: arguments for pytest.
    :ivar environ: environment variables, for the installation too.
    :ivar sqlalchemy: what to install of it; if not said, what this environment has.
    :ivar known: tests that the wrap breaks for a reason that lies in how they test.
    """

    version: str
    needs: tuple[str, ...]
    seams: tuple[str, ...]
    small: bool = True
    options: tuple[str, ...] = ()
    environ: dict[str, str] = field(default_factory=dict)
    sqlalchemy: str = f"SQLAlchemy=={metadata.version('SQLAlchemy')}"
    known: dict[str, str] = field(default_factory=dict)


# All eight source distributions have their tests; bottle's lacks those of its server adapters.
SUITES = {
    "flask": Suite(
        "3.1.3", ("asgiref", "greenlet", "python-dotenv"), ("werkzeug",)
    ),  # pyproject.toml, dependency-groups.tests
    "werkzeug": Suite(
        "3.1.9",
        ("cffi", "cryptography", "ephemeral-port-reserve", "pytest-timeout", "watchdog<7"),
        ("werkzeug",),
        options=("-p", "pytest_timeout", "--timeout=30"),  # some wait without end for a file event
    ),  # pyproject.toml, dependency-groups.tests
    "webtest": Suite(
        "3.0.7", ("PasteDeploy", "pyquery", "WSGIProxy2"), ("webob", "webtest")
    ),  # setup.py, extras_require["tests"]
    "bottle": Suite("0.13.4", ("mako", "jinja2"), ("wsgiref",)),  # its tests skip what is missing
    "falcon": Suite(
        "4.4.0",
        (
            *("pyyaml", "requests", "aiofiles", "httpx", "uvicorn", "websockets"),
            *("cbor2", "msgpack", "mujson", "ujson", "python-rapidjson", "orjson", "msgspec"),
        ),  # requirements/tests
        ("wsgiref",),
        small=False,
        options=("--ignore=tests/asgi",),  # no WSGI there
        environ={"FALCON_DISABLE_CYTHON": "Y", "PYTHONASYNCIODEBUG": "1"},  # as in its tox.ini
    ),
    "webob": Suite(
        "1.8.11",
        (),
        ("webob", "webob-responses", "wsgiref"),
        known={
            "test_call_application_closes_iterable_when_mixed_w_write_calls": "what is given to "
            "write() comes as a part of the body instead (contract, section 2), so this caller "
            "leaves close() to its own caller, and the test does not call it"
        },
    ),
    "pyramid": Suite(
        "2.1",
        ("webtest", "zope.component"),
        ("pyramid", "webob", "webtest", "wsgiref"),
        small=False,
    ),  # pyproject.toml, dependency-groups.testing
    # Its tests make no requests at all, so each of them is run as one.
    "flask-sqlalchemy": Suite(
        "3.1.1",
        ("blinker",),  # requirements/tests.in
        ("tests", "werkzeug"),
        sqlalchemy="SQLAlchemy<2.1",  # its dataclasses fail on 2.1, with and without the wrap
        known={
            "test_scope": "outside of an app context db.session() raises, but not in a request: "
            "there it is the request's session, everywhere (contract, section 5)"
        },
    ),
}


@dataclass(frozen=True)
class Run:
    """What became of the tests, by their names, and how often an application was wrapped."""

    outcomes: dict[str, str]
    calls: int
    seconds: float

    def passed(self) -> set[str]:
        return {name for name, outcome in self.outcomes.items() if outcome == "passed"}


@dataclass(frozen=True)
class Result:
    """Both runs of a suite."""

    name: str
    without: Run
    wrapped: Run

    @property
    def broken(self) -> list[str]:
        """The tests that pass without the wrap, and fail, are skipped or are missing with it."""
        return sorted(self.without.passed() - self.wrapped.passed())

    def reason(self, test: str) -> str | None:
        """Return why *test* must differ, if that is known."""
        name = test.rpartition("::")[2].partition("[")[0]
        return SUITES[self.name].known.get(name)

    @property
    def unexplained(self) -> list[str]:
        return [test for test in self.broken if self.reason(test) is None]


class Workshop:
    """Where one suite is unpacked, installed and run."""

    def __init__(self, name: str, work_dir: Path) -> None:
        self.name = name
        self.suite = SUITES[name]
        self.folder = work_dir / name
        self.python = self.folder / "venv" / "bin" / "python"
        self.tree = self.folder / "tree"
        self.folder.mkdir(parents=True, exist_ok=True)

    def requirement(self) -> str:
        return f"{self.name}=={self.suite.version}"

    def say(self, message: str) -> None:
        print(f"{self.name}: {message}", flush=True)

    def environ(self, **more: str) -> dict[str, str]:
        """Return this process's environment without what would change the suite's tests."""
        left_out = ("PYTHONPATH", "PYTEST_ADDOPTS", "TRANSPARENCY_SEAMS")
        kept = {name: value for name, value in os.environ.items() if name not in left_out}
        # This repository lies on the path, and in it the pytest plugin for its users.
        return {**kept, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **self.suite.environ, **more}

    def prepare(self) -> None:
        """Make the environment, unless it is there as it is wanted."""
        pins = [f"{name}=={suite.version}" for name, suite in SUITES.items()]
        pins.append(self.suite.sqlalchemy)
        wanted = "\n".join([self.requirement(), PYTEST, *self.suite.needs, *pins, PATHS])
        stamp = self.folder / "installed"
        if stamp.exists() and stamp.read_text() == wanted:
            return
        stamp.unlink(missing_ok=True)
        self.say(f"downloading {self.requirement()}")
        self.download()
        self.say("making its environment")
        self.install(pins)
        stamp.write_text(wanted)

    def download(self) -> None:
        """Fetch the source distribution, and no wheel; what builds it may come as a wheel."""
        for old in self.folder.glob("*.tar.gz"):
            old.unlink()
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
        command += ["--no-binary", self.name, "-d", str(self.folder), self.requirement()]
        subprocess.run(command, env=self.environ(), check=True)

    def install(self, pins: Sequence[str]) -> None:
        constraints = self.folder / "constraints.txt"
        constraints.write_text("\n".join(pins) + "\n")
        venv.create(self.folder / "venv", clear=True, with_pip=True)
        command = [str(self.python), "-m", "pip", "install", "-q", "-c", str(constraints)]
        command += [str(self.source()), PYTEST, "SQLAlchemy", *self.suite.needs]
        subprocess.run(command, env=self.environ(), check=True)
        for packages in self.folder.glob("venv/lib/python*/site-packages"):
            (packages / "transparency.pth").write_text(PATHS)

    def source(self) -> Path:
        (archive,) = self.folder.glob("*.tar.gz")
        return archive

    def unpack(self) -> Path:
        """Unpack the project anew: a run must not find what another left behind."""
        shutil.rmtree(self.tree, ignore_errors=True)
        with tarfile.open(self.source()) as archive:
            archive.extractall(self.tree, filter="data")
        (self.tree / "pytest.ini").touch()  # that of this repository is not looked for
        (top,) = (path for path in self.tree.iterdir() if path.is_dir())
        return top

    def run(self, kind: str, *options: str, **environ: str) -> Run:
        """Run the suite; its output goes to a file beside the environment."""
        log, report = self.folder / f"{kind}.log", self.folder / f"{kind}.xml"
        report.unlink(missing_ok=True)
        command = [str(self.python), "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += [*options, *self.suite.options, f"--junitxml={report}"]
        top, began = self.unpack(), monotonic()
        with log.open("w") as output:
            done = subprocess.run(
                command,
                cwd=top,
                env=self.environ(PYTHONPATH=str(top), **environ),  # before the installed copy
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=PATIENCE,
            )
        seconds = monotonic() - began
        lines = log.read_text(errors="replace").splitlines() or ["no output"]
        if done.returncode not in (0, 1) or not report.exists():
            raise SystemExit("\n".join([*lines[-40:], f"{self.name}: pytest ended {done}"]))
        self.say(f"{kind}: {lines[-1].strip('= ')}; see {log}")
        return Run(read_report(report), self.calls(), seconds)

    def calls(self) -> int:
        count = self.folder / "calls"
        return count.stat().st_size if count.exists() else 0

    def run_both(self) -> Result:
        """Run without and with the wrap, and say what differs."""
        self.prepare()
        count = self.folder / "calls"
        count.unlink(missing_ok=True)
        without = self.run("without")
        seams = " ".join(self.suite.seams)
        wrapped = self.run(
            "wrapped", "-p", PLUGIN, TRANSPARENCY_SEAMS=seams, TRANSPARENCY_CALLS=str(count)
        )
        result = Result(self.name, without, wrapped)
        for name, outcome in sorted(without.outcomes.items()):
            if outcome == "failed":
                self.say(f"fails without the wrap: {name}")
        for name in result.broken:
            outcome = wrapped.outcomes.get(name, "missing")
            self.say(f"BROKEN by the wrap ({outcome}): {name}")
            self.say(f"    {result.reason(name) or 'nobody knows why yet'}")
        return result


def read_report(report: Path) -> dict[str, str]:
    """Return what became of each test; one that is told of twice has its worst outcome."""
    ranks = ["passed", "skipped", "failed"]
    outcomes: dict[str, str] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        kinds = {child.tag for child in case}
        outcome = "skipped" if "skipped" in kinds else "passed"
        if kinds & {"failure", "error"}:
            outcome = "failed"
        outcomes[name] = max(outcome, outcomes.get(name, "passed"), key=ranks.index)
    return outcomes


def summarize(results: Sequence[Result], known: bool) -> bool:
    """Print the table; return whether all is well, or *known* not to be."""
    row = "{:<18}{:>10}{:>10}{:>8}{:>9}{:>16}"
    print("\n" + row.format("suite", "without", "wrapped", "broken", "calls", "seconds"))
    for result in results:
        without, wrapped = result.without, result.wrapped
        seconds = f"{without.seconds:.0f} and {wrapped.seconds:.0f}"
        passed = len(without.passed()), len(wrapped.passed())
        print(row.format(result.name, *passed, len(result.broken), wrapped.calls, seconds))
        if not wrapped.calls:
            print(f"{result.name}: no application was wrapped, so this proves nothing")
    bad = [result.unexplained if known else result.broken for result in results]
    return not any(bad) and all(result.wrapped.calls for result in results)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run other projects' tests, wrapped.")
    parser.add_argument("suite", nargs="*", help="default: the smaller ones")
    parser.add_argument("--list", action="store_true", help="name the suites, and stop")
    parser.add_argument("--work-dir", type=Path, default=WORK_DIR, metavar="DIR")
    parser.add_argument("--known", action="store_true", help="pass if all that breaks is explained")
    given = parser.parse_args(arguments)
    if given.list:
        for name, suite in SUITES.items():
            print(f"{name} {suite.version}{'' if suite.small else ' (only if named)'}")
        return 0
    names = given.suite or [name for name, suite in SUITES.items() if suite.small]
    for name in names:
        if name not in SUITES:
            parser.error(f"there is no suite {name!r}; there are {', '.join(SUITES)}")
    work_dir = given.work_dir.resolve()
    results = [Workshop(name, work_dir).run_both() for name in names]
    return 0 if summarize(results, given.known) else 1


if __name__ == "__main__":
    sys.exit(main())
