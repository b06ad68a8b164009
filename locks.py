"""
A lock that ends with its process, on Linux, Mac and Windows.
"""
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
