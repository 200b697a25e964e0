"""What the README says is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support import serve_once
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

import serve
from web.options import make_parser

PATH = Path(serve.__file__).with_name("README.md")
README = PATH.read_text("utf-8")


def test_its_length() -> None:
    """The README can be read in one sitting: 90 to 120 lines, code before line 20."""
    lines = README.splitlines()
    assert 90 <= len(lines) <= 120
    assert "application = SessionMiddleware(app, Session)" in lines[:19]


def test_its_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Each Python block of the README runs, in order, and says what it promises."""
    document = Sybil([PythonCodeBlockParser()]).parse(PATH)
    blocks = list(document.examples())
    for block in blocks:
        block.evaluate()
    assert len(blocks) == README.count("```python")
    assert capsys.readouterr().out == "sent\n"
    reply = serve_once(document.namespace["application"])
    assert (reply.status, reply.content) == ("200 OK", b"done\n")
    document.namespace["Session"].get_bind().dispose()
    document.namespace["Session"].remove()


def test_its_options_exist() -> None:
    """Each option of the command line that the README names is one."""
    named = set(re.findall(r"--[a-z][a-z-]+", README)) - {"--strict", "--help"}
    assert named <= set(re.findall(r"--[a-z][a-z-]+", make_parser().format_help()))
