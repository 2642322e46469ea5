"""One holder at a time of a run folder or an environment, on every system."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from sglp_deploy.errors import ConfigError, StorageError

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextmanager
def held(path: Path, *, busy: Callable[[], None]) -> Iterator[None]:
    """Hold the lock file ``path``; the system lets it go when the process ends, however it ends.

    Args:
        path: Made when it is missing; it stays.
        busy: Called once when another process holds it; raises to give up, returns to wait.

    Raises:
        ConfigError: If ``path`` is a symbolic link.
        StorageError: If the file system has no locks.
        OSError: If it cannot be written.
    """
    if path.is_symlink():
        raise ConfigError(
            f"{path} is a symbolic link; a lock is a file of our own and no link is followed; remove the link"
        )
    # A soft lock, which filelock falls back to, would outlive a killed holder.
    file = FileLock(path, fallback_to_soft=False)
    try:
        file.acquire(timeout=0)
    except Timeout:
        busy()
        file.acquire()
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        raise StorageError(
            f"{path} cannot be locked; its file system has no locks (some network file systems and FUSE), and two "
            "processes would mix their files; name a folder on another disk"
        ) from error
    try:
        yield
    finally:
        file.release()
