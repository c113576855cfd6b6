"""What to leave out of a copy: the rules of ``.dockerignore`` and of ``.gitignore`` files.

Paths are relative to the directory that is copied, with ``/`` between the parts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from typing import Protocol

from serpentine.errors import InvalidSetting

__all__ = ["DockerRules", "GitRules", "Rules"]

_GITIGNORE = ".gitignore"


class Rules(Protocol):
    """Whether something is left out."""

    def enter(self, folder: str, names: Iterable[str], read: Callable[[str], bytes]) -> None:
        """Learn what lies in a directory before anything in it is asked about."""
        ...

    def excludes(self, path: str, *, folder: bool) -> bool:
        """Tell whether a path is left out, with all that is in it."""
        ...

    def may_keep(self, path: str) -> bool:
        """Tell whether something in a directory that is left out could still be wanted."""
        ...


class DockerRules:
    """``.dockerignore``: patterns from the top of the tree, the last that matches wins.

    ``*`` and ``?`` stop at ``/``, ``**`` does not, ``!`` takes back.  What matches a directory
    matches all that is in it.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        self._rules: list[tuple[bool, re.Pattern[str]]] = []
        for line in lines:
            self._add(line)
        self._takes_back = any(keep for keep, _ in self._rules)

    def _add(self, line: str) -> None:
        line = line.removeprefix("\ufeff")
        if line.startswith("#") or not line.strip():
            return
        pattern = line.strip()
        keep = pattern.startswith("!")
        pattern = pattern.removeprefix("!").strip()
        parts: list[str] = []
        for part in pattern.split("/"):
            if part == "..":
                parts = parts[:-1]
            elif part not in ("", "."):
                parts.append(part)
        # "." alone: Docker leaves nothing out for it.
        if parts:
            try:
                self._rules.append((keep, re.compile(_expression("/".join(parts)), re.DOTALL)))
            except re.error:
                raise InvalidSetting(
                    f"{line!r} is no pattern of a .dockerignore", hint="correct it"
                ) from None

    def enter(self, folder: str, names: Iterable[str], read: Callable[[str], bytes]) -> None:
        """Have nothing to learn: all rules are at the top."""

    def excludes(self, path: str, *, folder: bool) -> bool:
        """Tell whether the last pattern that matches it or a directory above leaves it out."""
        del folder
        for keep, pattern in reversed(self._rules):
            if pattern.fullmatch(path):
                return not keep
        return False

    def may_keep(self, path: str) -> bool:
        """Tell whether there is a ``!`` at all; what it matches below is seen there."""
        del path
        return self._takes_back


def _expression(pattern: str) -> str:
    """Return the regular expression for a pattern of Go's filepath.Match, with ``**``."""
    out: list[str] = []
    place = 0
    while place < len(pattern):
        char = pattern[place]
        place += 1
        if char == "*":
            if pattern[place : place + 1] == "*":
                place += 1
                if pattern[place : place + 1] == "/":
                    place += 1
                    out.append("(?:.*/)?")
                else:
                    out.append(".*")
            else:
                out.append("[^/]*")
        elif char == "?":
            out.append("[^/]")
        elif char == "\\" and place < len(pattern):
            out.append(re.escape(pattern[place]))
            place += 1
        elif char == "[":
            end = pattern.find("]", place + 1)
            if end < 0:
                raise re.error("no closing bracket", pattern, place)
            inside = pattern[place:end]
            place = end + 1
            negated = inside[:1] in ("^", "!")
            # Only the range's own dash keeps a meaning; backslash quotes as in Go.
            body = re.sub(
                r"([\[&~|])", r"\\\1", inside.removeprefix(inside[0]) if negated else inside
            )
            out.append(f"(?!/)[{'^' if negated else ''}{body}]")
        else:
            out.append(re.escape(char))
    # A directory's pattern holds for what is in it.
    return "".join(out) + "(?:/.*)?"


class GitRules:
    """``.gitignore`` files, each for its directory and below; ``.git`` itself is left out, too.

    above: the ``.gitignore`` files of the directories above the one that is copied, and
        ``.git/info/exclude``, topmost first: the path of the copied directory from there, and
        the file's bytes.
    """

    def __init__(self, above: Iterable[tuple[str, bytes]] = ()) -> None:
        self._above = [(prefix, _spec(data)) for prefix, data in above]
        self._specs: dict[str, _Spec] = {}

    @classmethod
    def for_folder(cls, folder: str) -> GitRules:
        """Read what lies above a directory, up to the top of the repository that it is in."""
        found: list[tuple[str, bytes]] = []
        here, below = os.path.realpath(folder), ""
        while True:
            git = os.path.join(here, ".git")
            top = os.path.lexists(git)
            if below:
                found.append((below, _read(os.path.join(here, _GITIGNORE))))
            if top:
                exclude = os.path.join(git, "info", "exclude")
                found.append((below, _read(exclude)))
                return cls((prefix, data) for prefix, data in reversed(found) if data)
            parent, name = os.path.split(here)
            if parent == here:
                return cls()  # in no repository: only what lies in the directory itself counts
            here, below = parent, f"{name}/{below}" if below else f"{name}/"

    def enter(self, folder: str, names: Iterable[str], read: Callable[[str], bytes]) -> None:
        """Read the directory's own ``.gitignore``."""
        if _GITIGNORE in names:
            self._specs[folder] = _spec(read(_GITIGNORE))

    def excludes(self, path: str, *, folder: bool) -> bool:
        """Tell what the nearest file that says something about it says."""
        if path.rpartition("/")[2] == ".git":
            return True
        asked = f"{path}/" if folder else path
        here = path
        while here:
            here = here.rpartition("/")[0]
            spec = self._specs.get(here)
            if spec is not None:
                said = spec(asked[len(here) + 1 :] if here else asked)
                if said is not None:
                    return said
        for prefix, spec in reversed(self._above):
            said = spec(prefix + asked)
            if said is not None:
                return said
        return False

    def may_keep(self, path: str) -> bool:
        """Return False: git cannot take back what is in a directory that is left out."""
        del path
        return False


_Spec = Callable[[str], "bool | None"]


def _spec(data: bytes) -> _Spec:
    from pathspec import GitIgnoreSpec

    lines = data.removeprefix(b"\xef\xbb\xbf").decode(errors="surrogateescape").splitlines()
    spec = GitIgnoreSpec.from_lines(lines)
    return lambda path: spec.check_file(path).include


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""
