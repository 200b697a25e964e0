"""The reference pages of the item service have each option and each operation, as they are."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from typing import Any

import pytest
from processes import ROOT
from processes import serve as serving_items

from web.options import make_parser

DOCS = ROOT / "docs"
API = (DOCS / "openapi.md").read_text("utf-8")


def rows(page: str) -> list[list[str]]:
    """The cells of a page's tables, in the rows that begin with code; without its marks."""
    lines = re.findall(r"^\| (`.*) \|$", (DOCS / page).read_text("utf-8"), re.MULTILINE)
    return [[cell.strip() for cell in line.replace("`", "").split("|")] for line in lines]


OPTIONS = rows("options.md")


def default_of(flag: str) -> Any:
    return make_parser().get_default(flag.removeprefix("--").replace("-", "_"))


def test_the_page_has_each_option() -> None:
    """The options of ``serve.py --help`` are those of the page, in the same order."""
    shown = re.findall(r"^  (--\w[^ ,]*)", make_parser().format_help(), re.MULTILINE)
    on_page = [re.split("[ ,]", option)[0] for option, *_ in OPTIONS]
    assert on_page == [flag for flag in shown if flag != "--version"]


@pytest.mark.parametrize("row", OPTIONS, ids=lambda row: row[0])
def test_an_option_is_as_the_page_says(row: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The default is that of the page, and the environment variable that it names changes it."""
    option, variable, default, _ = row
    flag = re.split("[ ,]", option)[0]
    found = default_of(flag)
    assert {True: "yes", False: "no", None: ""}.get(found, found) == default
    if variable:
        other = {"text": "json", "info": "debug", True: "no"}.get(found, "yes")
        monkeypatch.setenv(variable, other)
        assert default_of(flag) != found
    else:
        assert flag == "--purge-keys"


def test_the_page_has_each_operation() -> None:
    """Method, path, parameters and success of each operation are those of the document."""
    document = json.loads((ROOT / "web" / "openapi.json").read_text("utf-8"))

    def name(parameter: dict[str, str]) -> str:
        _, _, key = parameter["$ref"].rpartition("/")
        return str(document["components"]["parameters"][key]["name"])

    described = [
        (
            f"{method.upper()} {path}",
            {name(one) for one in operation.get("parameters", [])},
            {status for status in operation["responses"] if status < "400"},
        )
        for path, item in document["paths"].items()
        for method, operation in item.items()
        if method != "parameters"
    ]
    on_page = [
        (request, set(filter(None, parameters.split(", "))), set(success.split(", ")))
        for request, _, parameters, success in rows("openapi.md")
    ]
    assert on_page == described


def test_its_requests_get_what_it_shows(sqlite_url: str) -> None:
    """Each curl on the page, sent to the service on an empty file, prints the next line."""
    shown = re.findall(r"^\$ (curl .*)\n(\{.*)$", API, re.MULTILINE)
    assert len(shown) == 4
    with serving_items("--database-url", sqlite_url) as server:
        for command, expected in shown:
            words = shlex.split(command.replace("127.0.0.1:8080", f"127.0.0.1:{server.port}"))
            done = subprocess.run([*words, "-sS"], capture_output=True, text=True, check=True)
            assert done.stdout.strip() == expected, command
