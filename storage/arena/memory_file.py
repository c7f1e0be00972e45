"""Memory behind a descriptor: a memfd, or where these are forbidden a file of /dev/shm that has no name either.

Imports nothing but Python's own, as all that a keeper does.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import logging
import os
import stat

log = logging.getLogger(__name__)

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_MFD_CLOEXEC, _MFD_ALLOW_SEALING = 0x1, 0x2
_MFD_NOEXEC_SEAL = 0x8
"""Linux 6.3; without it a system refuses memfds whose `vm.memfd_noexec` is 2, and with it all before do."""
_FLAGS = (_MFD_CLOEXEC | _MFD_ALLOW_SEALING, _MFD_CLOEXEC | _MFD_NOEXEC_SEAL)
_FORBIDDEN = (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EINVAL)
"""By a filter of system calls (seccomp), or by the kernel."""
_SHARED = "/dev/shm"


def memory_file(name: str) -> int:
    """A descriptor of memory, of which there is none yet. Raises OSError; it says so where no memfd may be made."""
    flags = _memfd_flags()
    return os.memfd_create(name, flags) if flags else _shared_file()


def memory_of(name: str, data: bytes) -> int:
    """A descriptor of memory with those bytes. Raises OSError."""
    fd = memory_file(name)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
    except BaseException:
        os.close(fd)
        raise
    return fd


def seal(fd: int) -> None:
    """Let nobody change the size of that memory any more, where that can be forbidden."""
    if _memfd_flags():
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)


def keeps_its_size(fd: int) -> bool:
    """Whether memory that somebody has sent cannot be made smaller by its sender.

    Where no memory can be sealed, what has no name is taken at its word: this user's processes alone can have it.

    Raises:
        OSError: it is no memory.
    """
    if _memfd_flags():
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS
    status = os.fstat(fd)
    return stat.S_ISREG(status.st_mode) and not status.st_nlink


@functools.cache
def _memfd_flags() -> int:
    """By which this process may have a memfd; 0 if it may not, which is told. Raises OSError where it cannot now."""
    why = "there is no such call"
    for flags in _FLAGS if hasattr(os, "memfd_create") else ():
        try:
            os.close(os.memfd_create("elastic-moe-probe", flags))
        except OSError as error:
            if error.errno not in _FORBIDDEN:
                raise
            why = os.strerror(error.errno)
            continue
        return flags
    log.warning("memfd_create is forbidden here (%s): states are staged in files of %s without a name", why, _SHARED)
    return 0


def _shared_file() -> int:
    try:
        return os.open(_SHARED, os.O_TMPFILE | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        why = f"memfd_create is forbidden here, and no file can be made in {_SHARED}: {error.strerror}"
        raise OSError(error.errno, why) from None


def room_for(fd: int, size_bytes: int) -> None:
    """Raise OSError where so much memory does not go into the file system behind the descriptor; a memfd has none."""
    if _memfd_flags():
        return
    found = os.fstatvfs(fd)
    if size_bytes > (free_bytes := found.f_bavail * found.f_frsize):
        mib = free_bytes / 2**20
        why = f"memfd_create is forbidden here, and only {mib:.0f} MiB are free in {_SHARED}"
        raise OSError(errno.ENOSPC, why)
