"""In the place of `os.fsync`: a test sees a file that was not synced as well, and cannot see a host lose its power."""


def fsync(fd: object) -> None:
    """Nothing."""
