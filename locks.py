"""
One process at a time: locks that end with their process, on Linux, Mac and Windows.
"""
import contextlib
import os
import time

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt
    fcntl = None


def lock(file, wait):
    """Locks an open file until it is closed. OSError: another process holds it, unless told to wait."""
    if fcntl:
        return fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    while True:
        try:
            file.seek(0)
            return msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            if not wait:
                raise
            time.sleep(0.2)


def is_at(file, path):
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def alone(path):
    """Waits until no other process is in here with the same `path`, of a file that is there meanwhile."""
    while True:
        with open(path, "a", encoding="utf-8") as file:
            lock(file, wait=True)
            if is_at(file, path):  # else who was in here has removed it, and another may be at a new one
                try:
                    yield
                finally:
                    with contextlib.suppress(PermissionError):  # Windows keeps what is open
                        os.unlink(path)
                return
