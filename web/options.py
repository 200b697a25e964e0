"""The command line, whose options can also be set by environment variables."""

import argparse
import os
import re
from collections.abc import Collection, Mapping
from ipaddress import ip_address
from typing import Any, NoReturn

from sessionscope import __version__
from sqlalchemy.engine import URL

from web.router import MAX_BODY

LISTEN = "an address, a PORT on the loopback interface, or unix:/PATH for a socket"


class StartError(Exception):
    """The service cannot start; the message says why, and what to do."""


class Parser(argparse.ArgumentParser):
    """A parser that raises where argparse's own ends the process."""

    def error(self, message: str) -> NoReturn:
        raise StartError(message)


SWITCH = {"yes": True, "true": True, "on": True, "1": True}
SWITCH |= {"no": False, "false": False, "off": False, "0": False}

# Browsers send an Origin in lower case (RFC 6454, 6.2).
_ORIGIN = re.compile(r"[a-z][a-z\d+.-]*://([a-z\d._-]+|\[[a-f\d:.]+\])(:\d+)?", re.ASCII)


def make_parser() -> Parser:
    """Make the parser; the environment overrides the defaults that its help shows.

    :raises StartError: if a variable has a value that its option does not have.
    """
    parser = Parser(
        prog="serve.py",
        description="Serve items over HTTP.",
        epilog="Each option except --purge-keys can also be set by an environment variable: "
        "LOG_LEVEL stands for --log-level.",
    )
    parser.add_argument("--version", action="version", version=f"sessionscope {__version__}")
    database = parser.add_argument_group("database")
    add(database, "--database-url", "sqlite:///items.db", "a SQLAlchemy URL", metavar="URL")
    add(database, "--reader-url", "", "the database to read from, such as a replica", metavar="URL")
    add_flag(database, "--create-tables", "yes", "create missing tables at start")
    add(database, "--wait", "0", "seconds to wait for the database", type=_number, metavar="N")
    purge = "delete idempotency keys older than DAYS, and exit"
    database.add_argument("--purge-keys", type=_number, metavar="DAYS", help=purge)
    server = parser.add_argument_group("server")
    add(server, "--listen", "127.0.0.1:8080", LISTEN, type=_address, metavar="HOST:PORT")
    for flag, default, text in [
        ("--threads", "8", "requests processed at the same time, and size of the connection pool"),
        ("--connections", "100", "maximum number of open client connections"),
        ("--max-body", str(MAX_BODY), "maximum size of a request body, in bytes"),
        ("--idle-timeout", "60", "seconds after which an idle client is disconnected"),
        ("--stop-timeout", "30", "seconds that running requests have to finish at shutdown"),
    ]:
        add(server, flag, default, text, type=_positive, metavar="N")
    proxy = "address of the proxy whose X-Forwarded-* headers are trusted"
    add(server, "--trusted-proxy", "", proxy, type=_proxy, metavar="IP")
    origins = "other origins whose pages may use the API, separated by spaces"
    add(server, "--cors-origins", "", origins, type=_origins, metavar="URLS")
    log = parser.add_argument_group("log and metrics")
    levels = ["debug", "info", "warning", "error"]
    add(log, "--log-level", "info", "debug shows each commit and rollback", choices=levels)
    add(log, "--log-format", "text", "the format of log lines", choices=["text", "json"])
    add_flag(log, "--metrics", "no", "serve /metrics for Prometheus")
    add_flag(log, "--demo", "no", "show the outcome of each session on the page")
    return parser


def parse_given(given: Mapping[str, Any]) -> argparse.Namespace:
    """Parse options that are given in Python; None stands for one that is left out.

    :raises TypeError: if there is no such option.
    :raises StartError: if it does not have such a value.
    """
    parser, arguments = make_parser(), []
    for name, value in given.items():
        if parser.get_default(name) is None:
            raise TypeError(f"there is no option {name!r}")
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            text = value.render_as_string(hide_password=False) if isinstance(value, URL) else value
            arguments.append(f"--{flag}={text}")
    return parser.parse_args(arguments)


def add(group: Any, flag: str, default: str, text: str, **more: Any) -> None:
    shown = f" (default: {default})" if default else ""
    value = environment(flag, default, more.get("choices", []))
    group.add_argument(flag, default=value, help=text + shown, **more)


def add_flag(group: Any, flag: str, default: str, text: str) -> None:
    value = SWITCH[environment(flag, default, SWITCH)]
    shown = f"{text} (default: {default})"
    group.add_argument(flag, action=argparse.BooleanOptionalAction, default=value, help=shown)


def environment(flag: str, default: str, choices: Collection[str]) -> str:
    """Return the value of the variable of an option.

    :param choices: what it may be; argparse does not check defaults.
    :raises StartError: if it is something else.
    """
    name = flag[2:].upper().replace("-", "_")
    value = os.environ.get(name) or default
    if choices and value not in choices:
        raise StartError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
    return value


def _address(text: str) -> str:
    if text.startswith("unix:/"):
        return text
    host, _, port = text.rpartition(":")
    if not (port.isdecimal() and int(port) < 2**16):
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT, PORT or unix:/PATH")
    return f"{host or '127.0.0.1'}:{port}"


def _number(text: str) -> int:
    if not (text.isdecimal() and int(text) < 100_000):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number below 100,000")
    return int(text)


def _positive(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above zero")
    return int(text)


def _proxy(text: str) -> str:
    if text in ("", "*", "localhost"):
        return text
    try:
        return str(ip_address(text))  # as the server writes it
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an IP address, localhost or *") from None


def _origins(text: str) -> str:
    for origin in text.split():
        if not _ORIGIN.fullmatch(origin):
            form = "an origin as browsers send it, such as https://shop.example"
            raise argparse.ArgumentTypeError(f"{origin!r} is not {form}")
    return text
