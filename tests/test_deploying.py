"""What docs/deploying.md says, as far as it can be tried: systemd, nginx, the backup."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import pytest
from databases import free_port, until, wait_for_port
from processes import ROOT, Process, create_many, serve
from support import PATIENCE

from web.options import make_parser

PAGE = (ROOT / "docs" / "deploying.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    """The blocks of a language on the page."""
    return re.findall(f"```{language}\n(.*?)```", PAGE, re.DOTALL)


def program(name: str) -> str:
    """The path of a program; in CI it must be there."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    if found is None and os.environ.get("CI") != "true":
        pytest.skip(f"left out, no {name} here")
    assert found is not None, f"{name} is not installed"
    return found


def test_the_unit_is_one(tmp_path: Path) -> None:
    """systemd finds no fault in the unit, where its program is there."""
    (unit,) = blocks("systemd")
    python = tmp_path / "python"
    python.symlink_to("/bin/true")
    path = tmp_path / "items.service"
    path.write_text(unit.replace("/opt/items/.venv/bin/python", str(python)))
    command = [program("systemd-analyze"), "verify", "--man=no", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, str(path) in done.stderr) == (0, False), done.stderr


def test_its_variables_are_options() -> None:
    """Each variable that the page sets is an option of the service."""
    found = re.findall(r"^Environment=(\w+)=", PAGE, re.MULTILINE)
    for line in re.findall("^ENV (.*)", PAGE, re.MULTILINE):
        found += re.findall(r"(\w+)=", line)
    assert len(found) == 7
    known = make_parser().format_help()
    for variable in found:
        assert "--" + variable.lower().replace("_", "-") in known


def test_the_container_is_stopped_in_order() -> None:
    """The container's command is the service itself, which gets the signal."""
    (file,) = blocks("dockerfile")
    (command,) = re.findall("^CMD (.*)", file, re.MULTILINE)
    assert json.loads(command) == ["python", "serve.py"]


def test_the_backup_is_whole(sqlite_url: str, tmp_path: Path) -> None:
    """The page's command copies what was acknowledged, while the service runs."""
    (command,) = re.findall(r"^\$ sqlite3 .*", PAGE, re.MULTILINE)
    with serve("--database-url", sqlite_url) as service:
        ids = create_many(service, clients=2, each=5)
        words = shlex.split(command[2:])
        words[0] = program("sqlite3")
        words[1] = str(tmp_path / "items.db")
        words[2] = words[2].replace("/backup/items.db", f"{tmp_path}/copy.db")
        subprocess.run(words, check=True)
    with closing(sqlite3.connect(tmp_path / "copy.db")) as copy:
        assert [id for (id,) in copy.execute("SELECT id FROM items ORDER BY id")] == sorted(ids)


@contextmanager
def nginx(block: str, service: Process, folder: Path, port: int) -> Iterator[None]:
    """Run nginx with a block of the page in front of the service."""
    site = block.replace("listen 80;", f"listen 127.0.0.1:{port};")
    site = site.replace("127.0.0.1:8080", f"127.0.0.1:{service.port}")
    paths = "".join(
        f"{kind}_temp_path {folder}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off;\nuser root;\npid {folder}/pid;\nevents {{}}\n"
        f"http {{\naccess_log off;\n{paths}{site}}}\n"
    )
    log = folder / "nginx.log"
    command = [program("nginx"), "-e", str(log), "-c", str(folder / "nginx.conf")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        wait_for_port(process, port, log)
        yield
    finally:
        process.terminate()
        process.wait(PATIENCE)


@pytest.mark.parametrize(("number", "prefix"), [(0, "/"), (1, "/shop/")])
def test_it_serves_behind_nginx(number: int, prefix: str, tmp_path: Path) -> None:
    """Behind each server of the page the service works, links and all, also for old browsers."""
    url = f"sqlite:///{tmp_path}/items.db"
    with (
        serve("--database-url", url, "--trusted-proxy", "127.0.0.1") as service,
        free_port() as port,
        nginx(blocks("nginx")[number], service, tmp_path, port),
    ):

        def ask(method: str, path: str, **headers: str) -> tuple[int, dict[str, str], Any]:
            with closing(HTTPConnection("127.0.0.1", port, timeout=PATIENCE)) as connection:
                connection.request(method, path, headers=headers)
                response = connection.getresponse()
                found = {name.lower(): value for name, value in response.getheaders()}
                return response.status, found, json.load(response)

        status, headers, item = ask("POST", prefix, Origin=f"http://127.0.0.1:{port}")
        assert (status, item) == (200, {"id": 1, "name": "Item #1"})
        status, _, shown = ask("GET", urljoin(prefix, headers["location"]))
        assert (status, shown) == (200, item)
        ask("POST", prefix)
        _, headers, _ = ask("GET", f"{prefix}?limit=1")
        link = headers["link"][1 : headers["link"].index(">")]
        assert ask("GET", urljoin(f"{prefix}?limit=1", link))[2]["items"][0]["id"] == 2
        assert len(headers["x-request-id"]) == 32
        status, _, _ = ask("POST", prefix, Origin="http://evil.test")
        assert status == 403
        line = f"id={headers['x-request-id']}"
        until(lambda: line in service.log, "its line in the log")
