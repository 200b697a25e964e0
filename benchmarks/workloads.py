"""The script that is counted: a contestant or a service, and the requests it is told to serve.

It imports no sessionscope, unless that is what is counted.
"""

from __future__ import annotations

import sys

from contestants import CONTESTANTS
from counting import play
from plain import make_engine
from playing import directly, served
from services import SERVICES

if __name__ == "__main__":
    kind, name, url = sys.argv[1:]
    if kind == "session":
        play(directly(CONTESTANTS[name](make_engine(url))))
    else:
        play({"service": directly, "served": served}[kind](SERVICES[name](url)))
