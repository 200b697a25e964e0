"""What is shipped: the wheel holds the library and nothing else, and works on its own."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import BytesParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOT_SOURCE = (".*", "__pycache__", "build", "dist", "*.egg-info", "items.db*")

PACKAGE = ROOT / "sessionscope"
SHIPPED = {path.name: path for path in PACKAGE.glob("*.py")} | {
    "middleware.py": ROOT / "middleware.py"
}
"""What the package holds when it is installed, by the file that it comes from."""

WRAP_AN_APP = """
from sqlalchemy import create_engine, text
from sqlalchemy.orm import scoped_session, sessionmaker

from sessionscope import SessionMiddleware

engine = create_engine("sqlite://")
with engine.begin() as connection:
    connection.execute(text("CREATE TABLE items (name TEXT)"))
Session = scoped_session(sessionmaker(engine))

def app(environ, start_response):
    Session().execute(text("INSERT INTO items VALUES (:name)"), {"name": environ["name"]})
    start_response(environ["status"], [])
    return [b"done"]

application = SessionMiddleware(app, Session)
for status in ("200 OK", "404 Not Found"):
    environ = {"REQUEST_METHOD": "POST", "name": status, "status": status}
    assert application(environ, lambda status, headers: None) == [b"done"]
with engine.connect() as connection:
    print(*connection.scalars(text("SELECT name FROM items")))
engine.dispose()
"""

WRONG_TYPES = """
from sessionscope import SessionMiddleware, on_commit, session_scope
SessionMiddleware("app", "registry")
on_commit("registry", "callback")
session_scope("registry")
"""

INSTALLED = """
from importlib.metadata import distributions
print(*(distribution.name.lower().replace("_", "-") for distribution in distributions()))
"""

TEST_AN_APP = """
from sqlalchemy import create_engine, text
from sqlalchemy.orm import scoped_session, sessionmaker

engine = create_engine("sqlite://")
with engine.begin() as connection:
    connection.execute(text("CREATE TABLE items (name TEXT)"))
Session = scoped_session(sessionmaker(engine))

def test_the_kit(sessionscope_isolate):
    connection = sessionscope_isolate(Session)
    Session.execute(text("INSERT INTO items VALUES ('lamp')"))
    Session.commit()
    assert connection.scalar(text("SELECT count(*) FROM items")) == 1

def test_that_it_left_nothing():
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM items")) == 0
    engine.dispose()
"""


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an sdist, built from a copy of the tree, and of the wheel built from it."""
    tree = tmp_path_factory.mktemp("tree") / "clone"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    subprocess.run([sys.executable, "-m", "build", tree], check=True, stdout=subprocess.PIPE)
    return tree / "dist"


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (found,) = dist.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment in which the wheel is installed."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    interpreter = folder / "bin" / "python"
    subprocess.run([interpreter, "-m", "pip", "install", "--quiet", wheel], check=True)
    return interpreter


def run(python: Path, program: str, *arguments: str) -> str:
    """What *program* prints where only the interpreter's own environment is seen."""
    command = [str(python), "-I", "-W", "error", "-c", program, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def test_the_wheel_holds_the_library_alone(wheel: Path) -> None:
    """The wheel has the library, its type marker and metadata, and no other file."""
    info = "-".join(wheel.name.split("-")[:2]) + ".dist-info"
    with zipfile.ZipFile(wheel) as archive:
        assert sorted(archive.namelist()) == [
            f"{info}/METADATA",
            f"{info}/RECORD",
            f"{info}/WHEEL",
            f"{info}/entry_points.txt",
            f"{info}/licenses/LICENSE",
            f"{info}/top_level.txt",
            *sorted(f"sessionscope/{name}" for name in {*SHIPPED, "py.typed"}),
        ]
        for name, path in SHIPPED.items():
            assert archive.read(f"sessionscope/{name}") == path.read_bytes()


def test_it_requires_sqlalchemy_alone(wheel: Path) -> None:
    """What is not behind an extra is SQLAlchemy."""
    (name,) = (name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("/METADATA"))
    metadata = BytesParser().parsebytes(zipfile.ZipFile(wheel).read(name))
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert [line.partition(">")[0] for line in required] == ["SQLAlchemy"]


def test_the_sdist_holds_the_tests(dist: Path) -> None:
    """The sdist has all that the suite needs: modules, tests, examples, the page, settings."""
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("benchmarks", "docs", "examples", "sessionscope", "tests", "web")
    files = [*ROOT.glob("*.py"), *(path for name in folders for path in (ROOT / name).rglob("*"))]
    wanted = {
        str(path.relative_to(ROOT))
        for path in files
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert wanted | {"Makefile", "README.md", "LICENSE", "pyproject.toml"} <= held


def test_the_distributions_can_be_published(dist: Path) -> None:
    """twine finds nothing to complain of in the sdist and in the wheel."""
    found = [str(path) for path in dist.iterdir()]
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *found], check=True)


def test_installing_brings_sqlalchemy_alone(python: Path) -> None:
    """In a fresh environment the wheel is joined by SQLAlchemy and what that needs."""
    of_others = {"pip", "setuptools", "greenlet", "typing-extensions"}
    assert {*run(python, INSTALLED).split()} - of_others == {"sessionscope", "sqlalchemy"}


def test_the_installed_library_wraps_an_app(python: Path) -> None:
    """An application wrapped in the installed middleware commits its 200 and not its 404."""
    assert run(python, WRAP_AN_APP) == "200 OK\n"


def test_the_installed_library_has_types(python: Path, tmp_path: Path) -> None:
    """mypy finds each wrong argument, where the wheel is installed."""
    (tmp_path / "wrong.py").write_text(WRONG_TYPES, "utf-8")
    mypy = [sys.executable, "-m", "mypy", "--python-executable", str(python), "wrong.py"]
    found = subprocess.run(mypy, cwd=tmp_path, stdout=subprocess.PIPE, text=True).stdout
    assert found.count("[arg-type]") == 5


def test_pytest_finds_the_fixture(wheel: Path, tmp_path: Path) -> None:
    """Where the wheel and pytest are installed, a test has the fixture without configuration."""
    venv.create(tmp_path / "environment", with_pip=True)
    python = tmp_path / "environment" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", wheel, "pytest"], check=True)
    (tmp_path / "test_app.py").write_text(TEST_AN_APP, "utf-8")
    command = [str(python), "-m", "pytest", "-q", "-W", "error", "test_app.py"]
    subprocess.run(command, cwd=tmp_path, check=True)


def imports_of(path: Path) -> set[str]:
    """The modules that *path* imports when it runs; not those that only its types need."""
    imported = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.If):
            continue  # TYPE_CHECKING
        for one in ast.walk(node):
            if isinstance(one, ast.Import):
                imported |= {alias.name for alias in one.names}
            elif isinstance(one, ast.ImportFrom):
                imported.add(one.module or "")
                if one.module == "sessionscope":
                    imported |= {f"sessionscope.{alias.name}" for alias in one.names}
    return imported


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_the_library_names_sqlalchemy_alone(name: str) -> None:
    """No module of the library needs more than the standard library, SQLAlchemy and its own."""
    roots = {module.partition(".")[0] for module in imports_of(SHIPPED[name])}
    allowed = {"sqlalchemy", "sessionscope", *(["pytest"] if name == "pytest_plugin.py" else [])}
    assert roots - sys.stdlib_module_names <= allowed


ORDER = [
    "middleware", "attempt", "application", "replay", "outcome", "response", "unit_of_work",
    "committing", "staged_session", "callbacks", "guests", "confirm", "events", "trackers",
    "transactions", "participants", "forks", "errors", "databases", "states", "stage",
]  # fmt: skip
"""From the top down."""


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_down(name: str) -> None:
    """Each module of the core imports only those that stand below it."""
    own = {module.partition(".")[2] for module in imports_of(SHIPPED[f"{name}.py"])}
    below = ORDER[ORDER.index(name) + 1 :]
    assert own & {*ORDER} <= {*below}


LIMITS = {ast.FunctionDef: 40, ast.ClassDef: 200}


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_the_library_can_be_read(name: str) -> None:
    """No file has more than 450 lines, no class more than 200, no function more than 40."""
    source = SHIPPED[name].read_text("utf-8")
    assert source.count("\n") <= 450
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= LIMITS[type(node)], f"{node.name} has {lines} lines"
