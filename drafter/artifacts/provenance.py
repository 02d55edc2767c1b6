"""What a result is traced by: command line, commit, versions, and the machine that computed it. No torch here."""

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
    """What a manifest says of how its directory came about: the process as it started, and the machine it used."""
    return {
        **process(),
        "machine": machine(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


@functools.cache
def process() -> dict[str, Any]:
    """The command line, commit and versions when this was first called: a checkout may change during a long run."""
    return {
        "argv": sys.orig_argv,
        "commit": commit(),
        "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in LOGGED_VERSIONS},
        "cpus": os.cpu_count(),
    }


def commit() -> str:
    """The commit of the checkout that this file lies in; "unknown" without git or outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=60)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip() or "unknown"


def version(package: str) -> str:
    """The version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def machine() -> dict[str, Any]:
    """Processor, cores, and the GPU's name if this process has computed on one."""
    torch = sys.modules.get("torch")
    on_gpu = torch is not None and torch.cuda.is_initialized()
    gpu = torch.cuda.get_device_name() if torch is not None and on_gpu else None
    return {"processor": processor(), "cores": os.cpu_count(), "gpu": gpu}


def processor(information: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name; on systems that do not tell it, its architecture."""
    try:
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # macOS has no such file; an ARM kernel's has no such line
        pass
    return platform.processor() or platform.machine() or "unknown"


def describe_machine(recorded: dict[str, Any]) -> str:
    """The machine of a manifest's environment, in words."""
    known = recorded.get("machine", {})
    processors = f"{known.get('cores', recorded['cpus'])} CPU cores"
    if known.get("processor"):
        processors += f" ({known['processor']})"
    return f"{known['gpu']}, {processors}" if known.get("gpu") else processors
