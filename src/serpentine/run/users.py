"""Who a process runs as: what ``User`` of an image means in the image's own files.

As Docker resolves it: a name or a number, either with a group; a number need not be in any file.
"""

from __future__ import annotations

from dataclasses import dataclass

from serpentine.errors import UserNotFound

__all__ = ["User", "resolve_user"]

# What the kernel takes; -1 means "no change" there.
_MAX_ID = 2**31 - 1


@dataclass(frozen=True, slots=True)
class User:
    """User, group and supplementary groups as numbers, and the home directory.

    The group is among the supplementary ones, as in Docker since 20.10.18: otherwise a program
    that changes its group could get around a file that refuses its own (CVE-2022-36109).
    """

    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()
    home: str = "/"


@dataclass(frozen=True, slots=True)
class _Account:
    name: str
    uid: int
    gid: int
    home: str


@dataclass(frozen=True, slots=True)
class _Group:
    name: str
    gid: int
    members: tuple[str, ...]


def resolve_user(text: str, passwd: bytes | None, group: bytes | None) -> User:
    """Resolve ``USER[:GROUP]``; empty means root.

    ``passwd`` and ``group`` are the image's files; None where it has none.  What is written as a
    number is one, whoever may be called like that.  Without a group, the user's own and all that
    list them count; with one, only that.  Raises UserNotFound for a name that is in no file and
    for a number out of range.
    """
    name, _, group_name = text.partition(":")
    number = _number(name or "0")
    account = next(
        (a for a in _accounts(passwd) if (a.name == name if number is None else a.uid == number)),
        None,
    )
    if account is not None:
        uid, gid, home = account.uid, account.gid, account.home or "/"
    elif number is not None:
        uid, gid, home = number, 0, "/"
    else:
        raise UserNotFound(
            f"there is no user {name!r} in the image's /etc/passwd",
            hint="name one that is there, or give a number",
        )
    groups = _groups(group)
    if group_name:
        gid, held = _group(group_name, groups), []
    else:
        held = [g.gid for g in groups if account is not None and account.name in g.members]
    for one in (uid, gid, *held):
        _in_range(one)
    return User(uid, gid, tuple(dict.fromkeys((gid, *held))), home)


def _group(name: str, groups: list[_Group]) -> int:
    number = _number(name)
    if number is not None:
        return number
    found = next((g.gid for g in groups if g.name == name), None)
    if found is None:
        raise UserNotFound(
            f"there is no group {name!r} in the image's /etc/group",
            hint="name one that is there, or give a number",
        )
    return found


def _number(text: str) -> int | None:
    number = _digits(text)
    return None if number is None else _in_range(number)


def _digits(text: str) -> int | None:
    if not (text.isascii() and text.isdigit()):
        return None
    # No id has more; and Python refuses to read thousands of them.
    return int(text.lstrip("0")[:20] or "0")


def _in_range(number: int) -> int:
    if number > _MAX_ID:
        raise UserNotFound(
            f"{number} is no user or group number: the largest is {_MAX_ID}", hint="give another"
        )
    return number


def _lines(data: bytes | None) -> list[list[str]]:
    # A line that is not UTF-8 hurts only who is named in it.
    text = (data or b"").decode(errors="replace")
    lines = (line.strip() for line in text.split("\n"))
    return [line.split(":") for line in lines if line and not line.startswith("#")]


def _accounts(data: bytes | None) -> list[_Account]:
    found = []
    for parts in _lines(data):
        numbers = [_digits(part) for part in parts[2:4]]
        if len(numbers) == 2 and numbers[0] is not None and numbers[1] is not None:
            home = parts[5] if len(parts) > 5 else ""
            found.append(_Account(parts[0], numbers[0], numbers[1], home))
    return found


def _groups(data: bytes | None) -> list[_Group]:
    found = []
    for parts in _lines(data):
        number = _digits(parts[2]) if len(parts) > 2 else None
        if number is not None:
            members = tuple(parts[3].split(",")) if len(parts) > 3 else ()
            found.append(_Group(parts[0], number, members))
    return found
