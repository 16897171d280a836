"""What a result is kept with, and where: the machine, versions, bench/results."""

import importlib.metadata
import json
import os
import pathlib
import platform
import re

ROOT = pathlib.Path(__file__).resolve().parents[2]


def machine():
    """What a figure depends on."""
    return {"cpu": cpu(), "cores": os.cpu_count(), "system": platform.system()}


def cpu():
    try:
        found = re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
        return found.group(1) if found else platform.processor()
    except OSError:
        return platform.processor()


def versions(*packages):
    """Of Python and of packages that are installed."""
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **found}


def write_result(name, result):
    path = ROOT / "bench/results" / name
    path.write_text(json.dumps(result, indent=2) + "\n")
