"""Lock a directory on disk for one writer. The lock ends with the process that holds it.

Some file systems (Lustre without its `flock` option, NFS without a lock daemon) have no locks. There, a marker file
with the process and the host replaces the lock. On the same host, the marker of a process that has ended is taken over.
Another host cannot tell whether the process has ended, so `owner` says which file to remove.
"""

import errno
import os
import socket
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock

LOCK, MARKER = ".lock", ".lock.marker"
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


def take_lock(directory: Path) -> BaseFileLock:
    """Hold the directory's lock until `release` is called or the process ends.

    Raises:
        filelock.Timeout: another process holds it.
    """
    file = directory / LOCK
    lock = FileLock(file, timeout=0, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except (OSError, NotImplementedError) as problem:
        if isinstance(problem, OSError) and problem.errno not in UNSUPPORTED:
            raise
        file.unlink(missing_ok=True)
        marker = SoftFileLock(directory / MARKER, timeout=0, thread_local=False)
        marker.acquire()
        return marker
    file.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    return lock


def owner(directory: Path) -> str:
    """Return, as text, which process holds the directory's lock, and how to remove a marker whose process has ended."""
    marker = directory / MARKER
    try:
        if not marker.exists():
            return (directory / LOCK).read_text(encoding="utf-8") or "another process"
        process, host = marker.read_text(encoding="utf-8").splitlines()[:2]
        return f"process {process} on {host} (if it has ended, remove {marker})"
    except (OSError, ValueError):  # the lock was released a moment ago, or its file is not written yet
        return "another process"


def remove_locks(directory: Path) -> None:
    """Remove the files of the lock, once the directory is complete."""
    for name in (LOCK, MARKER):
        (directory / name).unlink(missing_ok=True)
