"""Record how a result was made: command line, commit, versions and machine. This module does not import torch."""

import functools
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

LOGGED_VERSIONS = ("torch", "transformers", "lightning", "datasets", "tokenizers", "numpy")


def environment() -> dict[str, Any]:
    """Return the environment for a manifest: the process as it started, the machine, and the time."""
    return {
        **process(),
        "machine": machine(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


@functools.cache
def process() -> dict[str, Any]:
    """Return the command line, commit and versions at the first call, since a checkout may change during a long run."""
    return {
        "argv": [Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]],  # where Python lies is of no use elsewhere
        "commit": commit(),
        "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in LOGGED_VERSIONS},
        "cpus": os.cpu_count(),
    }


def commit() -> str:
    """Return the commit hash of the checkout that contains this file; "unknown" without git or outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=60)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip() or "unknown"


def version(package: str) -> str:
    """Return the version of an installed package, or "unknown"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def machine() -> dict[str, Any]:
    """Return the processor, the cores, and the name of the GPU if this process has computed on one."""
    torch = sys.modules.get("torch")
    on_gpu = torch is not None and torch.cuda.is_initialized()
    gpu = torch.cuda.get_device_name() if torch is not None and on_gpu else None
    return {"processor": processor(), "cores": os.cpu_count(), "gpu": gpu}


def processor(information: Path = Path("/proc/cpuinfo")) -> str:
    """Return the processor's name, or its architecture on systems that do not report the name."""
    try:
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # macOS has no such file
        pass
    return platform.processor() or platform.machine() or "unknown"


def describe_machine(recorded: dict[str, Any]) -> str:
    """Return the machine of a manifest's environment as text."""
    known = recorded.get("machine", {})
    processors = f"{known.get('cores', recorded['cpus'])} CPU cores"
    if known.get("processor"):
        processors += f" ({known['processor']})"
    return f"{known['gpu']}, {processors}" if known.get("gpu") else processors
