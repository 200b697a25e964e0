"""The command line: each option may as well be an environment variable."""

from __future__ import annotations

import argparse
import os
from typing import Any

from sessionscope import __version__

from web.router import MAX_BODY

DEFAULT_URL = "sqlite:///items.db"

LISTEN = "an address, the PORT alone on loopback, or unix:/PATH of a socket"


class StartError(Exception):
    """The service cannot start; the message says why, and what to do."""


def make_parser() -> argparse.ArgumentParser:
    """Make the parser; what it says of defaults is the environment's, if that has a value."""
    parser = argparse.ArgumentParser(
        prog="serve.py",
        description="Serve items over HTTP.",
        epilog="Each option may be an environment variable: LOG_LEVEL stands for --log-level.",
    )
    parser.add_argument("--version", action="version", version=f"sessionscope {__version__}")
    database = Group(parser, "database")
    database.add("--database-url", DEFAULT_URL, "a SQLAlchemy URL", metavar="URL")
    database.add("--reader-url", "", "where to read, a replica for instance", metavar="URL")
    database.add_flag("--create-tables", True, "create the tables that are missing")
    database.add("--wait", "0", "seconds to wait for the database", type=_number, metavar="N")
    database.group.add_argument(
        "--purge-keys",
        type=_number,
        metavar="DAYS",
        help="delete the idempotency keys that are older, and exit",
    )
    server = Group(parser, "server")
    server.add("--listen", "127.0.0.1:8080", LISTEN, type=_address, metavar="HOST:PORT")
    for flag, default, text in [
        ("--threads", "8", "requests that run at once, and connections to the database"),
        ("--connections", "100", "clients that may be connected"),
        ("--max-body", str(MAX_BODY), "bytes that a request's body may have"),
        ("--idle-timeout", "60", "seconds after which a silent client is disconnected"),
        ("--stop-timeout", "30", "seconds to finish what is running when told to stop"),
    ]:
        server.add(flag, default, text, type=_positive, metavar="N")
    server.add("--trusted-proxy", "", "believe the X-Forwarded headers of this IP", metavar="IP")
    server.add("--cors-origins", "", "other sites whose pages may call, as URLs", metavar="URLS")
    log = Group(parser, "log and metrics")
    levels = ["debug", "info", "warning", "error"]
    log.add("--log-level", "info", "debug shows each commit and rollback", choices=levels)
    log.add("--log-format", "text", "how a line is written", choices=["text", "json"])
    log.add_flag("--metrics", False, "serve /metrics for Prometheus")
    log.add_flag("--demo", False, "show on the page what becomes of each session")
    return parser


class Group:
    """Options with a headline; the default of each may be in the environment."""

    def __init__(self, parser: argparse.ArgumentParser, title: str) -> None:
        self.group = parser.add_argument_group(title)

    def add(self, flag: str, default: str, text: str, **more: Any) -> None:
        shown = f" (default: {default})" if default else ""
        value = os.environ.get(variable(flag)) or default
        self.group.add_argument(flag, default=value, help=text + shown, **more)

    def add_flag(self, flag: str, default: bool, text: str) -> None:
        value = os.environ.get(variable(flag), "").lower()
        self.group.add_argument(
            flag,
            action=argparse.BooleanOptionalAction,
            default=value in ("1", "on", "true", "yes") if value else default,
            help=text,
        )


def variable(flag: str) -> str:
    return flag[2:].upper().replace("-", "_")


def _address(text: str) -> str:
    if text.startswith("unix:/"):
        return text
    host, _, port = text.rpartition(":")
    if not (port.isdecimal() and int(port) < 2**16):
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT, PORT or unix:/PATH")
    return f"{host or '127.0.0.1'}:{port}"


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return int(text)


def _positive(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above zero")
    return int(text)
