"""Let schemathesis try the service on a PostgreSQL of its own, for minutes: ``make fuzz``.

The exit status is that of schemathesis, or 1 where the log of the service tells of a failure.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path
from secrets import randbelow
from tempfile import TemporaryDirectory

from databases import postgresql
from processes import serve

CONFIG = Path(__file__).with_name("schemathesis.toml")

FAILURE = re.compile(r"^\S+ \S+ (?:ERROR|CRITICAL) .*|Traceback.*", re.MULTILINE)


def main() -> int:
    """Run it; the exit status."""
    parser = argparse.ArgumentParser(description="Try the service with made-up requests.")
    parser.add_argument("--seconds", type=int, default=300, help="how long (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=randbelow(2**32), help="of an earlier run")
    options = parser.parse_args()
    with (
        TemporaryDirectory() as folder,
        postgresql() as node,
        serve("--database-url", node.url, "--log-level", "info") as server,
    ):
        url = f"http://127.0.0.1:{server.port}/openapi.json"
        command = [sys.executable, "-W", "ignore", "-m", "schemathesis.cli"]
        command += ["--config-file", str(CONFIG), "run", url, "--checks", "all"]
        command += ["--max-time", str(options.seconds), "--seed", str(options.seed)]
        hooks = {**os.environ, "PYTHONPATH": str(CONFIG.parent)}
        status = subprocess.run(command, cwd=folder, env=hooks, check=False).returncode
    failures = FAILURE.findall(server.log)
    print(*failures, f"the log tells of {len(failures)} failures", sep="\n")
    return status or bool(failures)


if __name__ == "__main__":
    sys.exit(main())
