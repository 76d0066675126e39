"""A path -> whether nobody but this user (and root) could have written what is there: what is loaded has to be so.

A file or folder is the user's own when it belongs to the user or to root and its mode lets nobody else write.  The
folders above it are checked as well, for whoever can rename one of them can put another in its place; there a sticky
folder (/tmp) is good enough, since only the owner renames what is in it, and so is a group that has the user alone.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from functools import lru_cache
from pathlib import Path

OTHERS = stat.S_IWGRP | stat.S_IWOTH
MOST = 64 << 20
"""Bytes of a file that is ours: no kernel and no tuning result comes near it."""


class UntrustedError(OSError):
    """Somebody else could have written a file or folder; the text says which, why, and what to do."""


def own_folder(folder: Path, base: Path | None = None) -> Path:
    """The real path of a folder that only this user can change; every link in its name is resolved.

    Args:
        folder: has to exist.
        base: a folder above it that is ours as well and is judged as strictly.

    Raises UntrustedError, or OSError where it is not there.
    """
    real = os.path.realpath(folder, strict=True)
    strict = {real} if base is None else {real, os.path.realpath(base, strict=True)}
    for path in (real, *map(str, Path(real).parents)):
        found = os.stat(path, follow_symlinks=False)
        if reason := _reason(found, path in strict):
            raise UntrustedError(f"{path} {reason}{_remedy(path, found)}")
    return Path(real)


def read_own(path: Path, most: int = MOST) -> bytes:
    """The bytes of a regular file that only this user can change, in a folder for which `own_folder` holds.  A link is
    not followed and a pipe not waited for.

    Raises UntrustedError, or OSError where it cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise UntrustedError(f"{path} is not a regular file; remove it")
        if reason := _reason(found, strict=True):
            raise UntrustedError(f"{path} {reason}; remove it")
        if found.st_size > most:
            raise UntrustedError(f"{path} has {found.st_size} bytes, more than the {most} that one of ours can have")
        return file.read(most + 1)


def _reason(found: os.stat_result, strict: bool) -> str:
    """Why something is not the user's own, as a clause; empty when it is."""
    if found.st_uid not in (0, os.geteuid()):
        return f"belongs to {_user(found.st_uid)}"
    open_to = found.st_mode & OTHERS
    if not strict:
        if found.st_mode & stat.S_ISVTX:
            return ""
        if open_to == stat.S_IWGRP and _is_private(found.st_gid, os.geteuid()):
            return ""
    return f"can be written by {'everybody' if open_to & stat.S_IWOTH else 'its group'}" if open_to else ""


def _remedy(path: str, found: os.stat_result) -> str:
    if found.st_uid == os.geteuid():
        return f" (chmod go-w {path}, after a look at what is in it)"
    return ""


@lru_cache(maxsize=64)
def _is_private(group: int, user: int) -> bool:
    """Whether a group has nobody in it but the user whose name it bears, as many systems make one for each user."""
    try:
        name, entry = pwd.getpwuid(user).pw_name, grp.getgrgid(group)
    except KeyError:
        return False
    return entry.gr_name == name and set(entry.gr_mem) <= {name}


def _user(number: int) -> str:
    try:
        return f"the user {pwd.getpwuid(number).pw_name}"
    except KeyError:
        return f"the user {number}"
