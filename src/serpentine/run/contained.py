"""Steps of a containerd in a container of ours, which we reach through a shell in it."""

from __future__ import annotations

import asyncio
import base64
import posixpath
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress

from serpentine._concurrency import shielded, task_group, unbroken
from serpentine.containerd import Mount
from serpentine.errors import CopyError, DaemonFailed, PathNotFound
from serpentine.run.network import Network, choose_resolv_conf
from serpentine.run.site import (
    STDERR,
    STDOUT,
    Folder,
    Found,
    OnOutput,
    Shell,
    ShellStream,
    Site,
    Stdio,
)

__all__ = ["PipedSite", "ShellSite"]

CLEANUP_TIMEOUT = 60.0
# What is written in one piece: each costs the other side a process of its own.
PIECE = 1 << 18
# To start a script takes the engine 60 to 100 ms: those that are done wait for the next step.
MAX_IDLE = 8

MAX_FILE = 4 << 20
# Where our image has them.
PLUGINS = ("/opt/cni/bin",)

# $1: how many directories; these, the topmost first, below the directory $2; more mount
# options; then pairs of a path and whether its bytes are wanted.
#
# The kernel lays the directories over each other, so that its rules are kept, in a mount
# namespace that ends with the script.  Nothing but our own busybox runs in there, by its path:
# it is static, so that it loads no library of the image, and gets none of our environment.
_LOOK = """\
set -eu
mkdir -p /run/serpentine-look
exec unshare --mount sh -euc '
here=/run/serpentine-look busybox=$(command -v busybox)
"$busybox" mount -t tmpfs -o mode=700 tmpfs "$here"
mkdir -p "$here/tool/.serpentine" "$here/root"
cp "$busybox" "$here/tool/.serpentine/busybox"
cd "$1"
"$busybox" mount -t overlay -o "ro,nodev,lowerdir=$here/tool:$2" overlay "$here/root"
cd /
inside=$3; shift 3
exec env -i "$busybox" chroot "$here/root" /.serpentine/busybox sh -fuc "$inside" look "$@"
' look "$@"
"""
# Inside: for each path its kind, the topmost of it that is not there, the rest below that, and
# its bytes in base64, each with a NUL behind it.
_INSIDE = """\
busybox=/.serpentine/busybox
walk() {
  rest=$1 way= links=0
  while [ -n "$rest" ]; do
    name=${rest%%/*}
    case $rest in */*) rest=${rest#*/} ;; *) rest= ;; esac
    case $name in "" | .) continue ;; ..) way=${way%/*}; continue ;; esac
    if [ -L "$way/$name" ]; then
      links=$((links + 1))
      [ $links -le 40 ] || return 1
      target=$("$busybox" readlink -n "$way/$name"; printf x)
      target=${target%x}
      case $target in /*) way= ;; esac
      rest=$target/$rest
    elif [ -e "$way/$name" ]; then
      way=$way/$name
      [ -z "$rest" ] || [ -d "$way" ] || return 1
    else
      way=$way/$name
      return 0
    fi
  done
  return 1
}
while [ $# -gt 0 ]; do
  kind=other missing= rest=
  if [ -d "$1" ]; then kind=directory
  elif [ -f "$1" ]; then kind=file
  elif [ ! -e "$1" ] && walk "$1"; then kind=absent missing=$way
  fi
  [ "$kind" = absent ] || rest=
  printf "%s\\0%s\\0%s\\0" "$kind" "$missing" "$rest"
  if [ "$kind$2" = fileyes ]; then "$busybox" head -c MAX "$1" | "$busybox" base64; fi
  printf "\\0"
  shift 2
done
""".replace("MAX", str(MAX_FILE))

# $1 and $2: directories, as above; $3: what is run inside; $4: a path, with a slash at its end if
# it must be a directory; $5: its name in the archive, empty if its contents are meant.
#
# The path is resolved from inside, so that no link leads out, and has none left then.  The
# daemon's own tar reads a second view, which has no busybox of ours.  The end of its own input
# means that nobody wants the archive any more.
_PACK = """\
set -eu
mkdir -p /run/serpentine-look
exec unshare --mount sh -euc '
here=/run/serpentine-look busybox=$(command -v busybox)
"$busybox" mount -t tmpfs -o mode=700 tmpfs "$here"
cd "$here"
mkdir -p tool/.serpentine empty look root out
cp "$busybox" tool/.serpentine/busybox
cd "$1"
"$busybox" mount -t overlay -o "ro,nodev,lowerdir=$here/tool:$2" overlay "$here/look"
"$busybox" mount -t overlay -o "ro,nodev,lowerdir=$here/empty:$2" overlay "$here/root"
cd /
found=$(env -i "$busybox" chroot "$here/look" /.serpentine/busybox sh -fuc "$3" where "$4" \\
  2>/dev/null && printf x) || { echo "serpentine-status absent" >&2; exit 0; }
found=$here/root${found%??} what=./$5
case $4 in
  */)
    what=.
    if [ -n "$5" ]; then
      mkdir "$here/out/$5"
      "$busybox" mount --bind "$found" "$here/out/$5"
      found=$here/out what=./$5
    fi ;;
esac
exec 3<&0
tar --format=pax --xattrs --xattrs-include="*" --numeric-owner --sparse --sort=name \\
  -C "$found" -cf - -- "$what" & packing=$!
{ cat >/dev/null; kill "$packing"; } <&3 >/dev/null 2>&1 & watching=$!
exec 3<&-
status=0
wait "$packing" || status=$?
kill "$watching"
echo "serpentine-status $status" >&2
' pack "$@"
"""
# Inside: the directory that a path is in, or that it is, without links.
_WHERE = """\
case $1 in
  */) cd "$1" ;;
  *) cd "${1%/*}/" && { [ -e "./${1##*/}" ] || [ -L "./${1##*/}" ]; } ;;
esac && pwd -P
"""
_STATUS = "serpentine-status "
_MAX_SAID = 1 << 16

# $1 and $2: the directories below the topmost one, as above; $3: the topmost one; the rest:
# paths in it.  Each is removed from within the directory that it is in, and only if that is
# where it seems to be: a link that a step left leads nowhere.  A directory above it that was
# copied up for it alone goes as well, or it would be a change of this layer.
_FORGET = """\
set -eu
mkdir -p /run/serpentine-look
exec unshare --mount sh -euc '
here=/run/serpentine-look busybox=$(command -v busybox)
"$busybox" mount -t tmpfs -o mode=700 tmpfs "$here"
mkdir "$here/1" "$here/2" "$here/below"
cd "$1"
"$busybox" mount -t overlay -o "ro,nodev,lowerdir=$here/1:$here/2${2:+:$2}" overlay "$here/below"
cd -P -- "$3"
top=$(pwd -P)
shift 3
enter() { cd -P -- "$1" 2>/dev/null && [ "$(pwd -P)" = "$1" ]; }
# All that is known of a directory but times.
all() {
  tar --xattrs --xattrs-include="*" --mtime=@0 --no-recursion \\
    --pax-option=exthdr.name=x,delete=atime,delete=ctime -cf - "$@" . | sha256sum
}
is_copy() {
  enter "$here/below$1" || return 1
  below=$(all)
  enter "$top$1" && [ "$(all --xattrs-exclude="*.overlay.*")" = "$below" ] || return 1
  ! tar --xattrs --xattrs-include="*" --no-recursion -cf - . | grep -q "overlay.opaque=y"
}
for path; do
  folder=${path%/*} name=${path##*/}
  enter "$top$folder" || continue
  if [ -L "$name" ]; then continue
  elif [ -d "$name" ]; then rmdir -- "./$name" 2>/dev/null || continue
  elif [ -f "$name" ] && [ ! -s "$name" ]; then rm -f -- "./$name"
  else continue
  fi
  while [ -n "$folder" ] && is_copy "$folder"; do
    name=${folder##*/} folder=${folder%/*}
    enter "$top$folder" && rmdir -- "./$name" 2>/dev/null || break
  done
done
' forget "$@"
"""

# Carries the pipes of one step after the other.  Its input says what to do, each in a line with a
# number of bytes behind it where it says so: "step FOLDER MARK INPUT OUTPUTS", "file NAME SIZE",
# "start", and if there is input, "data SIZE" and "end".  The end of its own input means that we
# are gone.  Each output ends with the mark, which nobody else knows: the container engine tells
# the end only when everything that was written to it is read, and later than we want to know.
_STEPS = """\
umask 077
take() { dd bs="$1" count=1 iflag=fullblock 2>/dev/null; }
# With what waits for input, or for somebody who reads it.
finish() { rm -rf "$folder"; kill -s KILL 0; }
while read -r what folder mark input outputs; do
  mkdir -p "$folder" && cd "$folder" || exit 1
  echo $$ >pid
  while read -r what name size && [ "$what" = file ]; do
    { [ "$size" = 0 ] || take "$size"; } >"$name" && chmod 644 "$name" || finish
  done
  [ "$what" = start ] && mkfifo $outputs || finish
  errors=
  if [ "$input" = yes ]; then
    mkfifo stdin || finish
    # For reading, too: it would wait otherwise, and not see that we are gone.
    exec 3<&0 4<>stdin
    {
      while read -r what size; do
        case $what in
          data) take "$size" >&4 ;;
          end) exec 4>&- ;;
        esac
      done
      finish
    } <&3 >/dev/null 2>&1 &
    exec 3<&- 4>&-
  fi
  echo ready
  # Each waits until containerd opens its other end.
  case $outputs in *stderr) { cat stderr; echo "$mark"; } >&2 & errors=$! ;; esac
  cat stdout
  echo "$mark"
  [ -z "$errors" ] || wait "$errors"
  # A step that closed its output may still read: this goes with whoever carries the input.
  [ "$input" = no ] || wait
  cd /
  rm -rf "$folder"
done
"""
# For a step whose folder is still there: its script may wait for somebody who reads, or writes.
_END = """\
read -r pid 2>/dev/null <"$1/pid" && kill -s KILL -- "-$pid" 2>/dev/null
rm -rf "$1"
"""


# In the one tree of version 2, or in one of the many of version 1.
_ABOUT = """\
for file in /sys/fs/cgroup/cgroup.procs /sys/fs/cgroup/pids/cgroup.procs; do
  [ ! -w "$file" ] || { printf cgroups; break; }
done
printf '\\0'
cat /proc/self/uid_map
printf '\\0'
cat /etc/resolv.conf
"""


class ShellSite(Site):
    """A container that we look into snapshots through."""

    shares_files = False

    def __init__(self, shell: Shell) -> None:
        self.shell = shell

    async def begin(self) -> Network:
        """Find out what the container can do, and return the network of its steps.

        Each step gets a copy of the container's resolvers: the file itself is not theirs to
        change.
        """
        cgroups, users, resolv_conf = (await self.shell.run(_ABOUT)).split(b"\0", 2)
        self.is_rootless = users.split() != [b"0", b"0", b"4294967295"]
        # A rootless engine gives the container a tree that is not to be written to.
        self.has_cgroups = cgroups == b"cgroups"
        return Network(plugins=PLUGINS, own_resolv_conf=choose_resolv_conf(resolv_conf, None))

    async def look(
        self, mounts: Sequence[Mount], paths: Mapping[str, bool]
    ) -> dict[str, Found] | None:
        """Mount the snapshot's directories, for nobody else to see, and look from inside."""
        layers = _layers(mounts)
        if layers is None:
            return None
        asked = [word for path, read in paths.items() for word in (path, "yes" if read else "no")]
        answer = await self.shell.run(_LOOK, *_overlay(mounts, layers), _INSIDE, *asked)
        words = iter(answer.split(b"\0"))
        found = {}
        for path, (kind, missing, rest, data) in zip(
            paths, zip(words, words, words, words, strict=False), strict=False
        ):
            found[path] = Found(
                kind.decode(),
                base64.b64decode(data) if kind == b"file" and paths[path] else None,
                missing.decode(errors="surrogateescape"),
                "/".join(
                    p
                    for p in rest.decode(errors="surrogateescape").split("/")
                    if p not in ("", ".")
                ),
            )
        return found

    async def forget(self, mounts: Sequence[Mount], paths: Sequence[str]) -> None:
        """Remove them in the snapshot's topmost directory."""
        layers = _layers(mounts)
        if layers is not None and paths:
            below = _overlay(mounts, layers[1:])
            await self.shell.run(_FORGET, *below, layers[0], *paths)

    @asynccontextmanager
    async def pack(
        self, mounts: Sequence[Mount], path: str, name: str, notice: Callable[[str], None]
    ) -> AsyncIterator[AsyncIterator[bytes] | None]:
        """Mount the snapshot's directories, for nobody else to see, and let tar read them."""
        layers = _layers(mounts)
        if layers is None:
            yield None
            return
        script = (_PACK, *_overlay(mounts, layers), _WHERE, path, name)
        async with (
            self.shell.open(*script) as stream,
            aclosing(_packed(stream, path, notice)) as archive,
        ):
            yield archive

    async def read_file(self, path: str) -> bytes:
        """Let the shell read it."""
        return await self.shell.run('cat -- "$1"', path)

    async def close(self) -> None:
        """End the shell."""
        await self.shell.close()


async def _packed(
    stream: ShellStream, path: str, notice: Callable[[str], None]
) -> AsyncGenerator[bytes, None]:
    """Yield what the script prints, in larger pieces; raises what it says that went wrong."""
    pieces: list[bytes] = []
    size = 0
    said = b""
    while (piece := await stream.read()) is not None:
        number, data = piece
        if number != STDOUT:
            said = (said + data)[-_MAX_SAID:]
            continue
        pieces.append(data)
        size += len(data)
        if size >= PIECE:
            yield b"".join(pieces)
            pieces, size = [], 0
    yield b"".join(pieces)
    *lines, last = said.decode(errors="backslashreplace").splitlines() or [""]
    if last == f"{_STATUS}absent":
        raise PathNotFound(f"there is no {path} in the state", path=path, hint="check the path")
    if last != f"{_STATUS}0":
        why = " | ".join([*lines, last][-3:]) or "it ended early"
        raise CopyError(
            f"cannot read {path} in the daemon's container: {why}",
            path=path,
            hint="see 'serpentine daemon logs', or try 'serpentine daemon upgrade'",
        )
    for line in lines:
        notice(line)


class PipedSite(ShellSite):
    """A container that has no folder in common with us: all goes through the shell."""

    def __init__(self, shell: Shell) -> None:
        super().__init__(shell)
        # Scripts that have carried a step and can carry another one.
        self._idle: list[_Carrier] = []

    @asynccontextmanager
    async def folder(
        self,
        step: str,
        files: Mapping[str, bytes],
        on_output: OnOutput,
        *,
        stdin: bool,
        terminal: bool,
    ) -> AsyncIterator[Folder]:
        """Make a directory in the container, and carry what goes through its pipes."""
        there = f"{await self.shell.folder()}/{step}"
        carrier: _Carrier | None = None
        stdio = _Carried(there, on_output, stdin=stdin, terminal=terminal)
        try:
            carrier = await self._begin(stdio, files)
            async with task_group() as group:
                carrying = group.create_task(stdio.carry())
                try:
                    yield Folder({name: f"{there}/{name}" for name in files}, stdio)
                finally:
                    carrying.cancel()
        finally:
            if carrier is not None and stdio.ended.is_set() and not stdin and self._has_room():
                self._idle.append(carrier)
            else:
                await shielded(self._end(stdio, carrier), timeout=CLEANUP_TIMEOUT)

    def _has_room(self) -> bool:
        return len(self._idle) < MAX_IDLE

    async def _begin(self, stdio: _Carried, files: Mapping[str, bytes]) -> _Carrier:
        """Let a script make files and pipes, one that there is if there is one."""
        while True:
            used = bool(self._idle)
            carrier = self._idle.pop() if used else await _Carrier.open(self.shell)
            try:
                # Unbroken: only when the script has noted itself can it be ended.  One that nobody
                # waits for would go on, and wait for a step that never comes.
                await unbroken(stdio.begin(carrier.stream, files), patience=CLEANUP_TIMEOUT)
            except BaseException as error:
                await shielded(carrier.close(), timeout=CLEANUP_TIMEOUT)
                # It may have ended with the container that it was in.
                if not (used and isinstance(error, DaemonFailed)):
                    raise
            else:
                return carrier

    async def _end(self, stdio: _Carried, carrier: _Carrier | None) -> None:
        if carrier is not None:
            await carrier.close()
        if stdio.stdin or not stdio.ended.is_set():
            await self.shell.run(_END, stdio.there)

    async def close(self) -> None:
        """End the scripts and the shell."""
        while self._idle:
            await self._idle.pop().close()
        await super().close()


class _Carrier:
    """A script that carries the pipes of one step after the other."""

    def __init__(self, stack: AsyncExitStack, stream: ShellStream) -> None:
        self.stream = stream
        self._stack = stack

    @classmethod
    async def open(cls, shell: Shell) -> _Carrier:
        stack = AsyncExitStack()
        return cls(stack, await stack.enter_async_context(shell.open(_STEPS)))

    async def close(self) -> None:
        await self._stack.aclose()


class _Carried(Stdio):
    """A step's pipes at the other end of a script's output and input."""

    def __init__(self, there: str, on_output: OnOutput, *, stdin: bool, terminal: bool) -> None:
        self.there = there
        self.stdout = f"{there}/stdout"
        self.stderr = "" if terminal else f"{there}/stderr"
        self.stdin = f"{there}/stdin" if stdin else ""
        self.ended = asyncio.Event()
        self._mark = f"{secrets.token_hex(16)}\n".encode()
        self._outputs = {STDOUT: End(self._mark)}
        if not terminal:
            self._outputs[STDERR] = End(self._mark)
        self._open = stdin
        self._stream: ShellStream | None = None
        self._on_output = on_output

    async def begin(self, stream: ShellStream, files: Mapping[str, bytes]) -> None:
        """Make files and pipes; returns when they are there."""
        self._stream = stream
        outputs = "stdout stderr" if self.stderr else "stdout"
        mark = self._mark.decode().strip()
        first = f"step {self.there} {mark} {'yes' if self.stdin else 'no'} {outputs}\n".encode()
        parts = [b"file %s %d\n%s" % (n.encode(), len(data), data) for n, data in files.items()]
        said = b""
        with suppress(BrokenPipeError):
            await stream.write(b"".join([first, *parts, b"start\n"]))
            while (piece := await stream.read()) is not None:
                said += piece[1]
                if said.endswith(b"ready\n"):
                    return
        raise DaemonFailed(
            f"cannot make the pipes of a step: {said.decode(errors='replace')}",
            hint="try 'serpentine daemon upgrade'",
        )

    async def carry(self) -> None:
        """Hand over what is printed, until the end."""
        assert self._stream is not None
        left = set(self._outputs)
        while left:
            if (piece := await self._stream.read()) is None:
                raise DaemonFailed(
                    "the output of a step was cut off", hint="see 'serpentine daemon logs'"
                )
            stream, data = piece
            output = self._outputs[stream]
            if data := output.feed(data):
                self._on_output(stream, data)
            if output.reached:
                left.discard(stream)
        self.ended.set()

    async def wait(self) -> None:
        await self.ended.wait()

    async def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            # Not at the end of the output: the step may still read, and whoever writes to one that
            # has ended is cancelled as soon as we hear of it.
            if not self._open or self._stream is None:
                raise BrokenPipeError
            piece, view = view[:PIECE], view[PIECE:]
            await self._stream.write(b"data %d\n%s" % (len(piece), piece))

    async def close_stdin(self) -> None:
        if self._open and self._stream is not None:
            self._open = False
            with suppress(BrokenPipeError):
                await self._stream.write(b"end\n")


class End:
    """Finds the mark that an output ends with, wherever its pieces are cut."""

    def __init__(self, mark: bytes) -> None:
        self._mark = mark
        self._held = b""
        self.reached = False

    def feed(self, data: bytes) -> bytes:
        """Return what is output for certain; what may be the beginning of the mark is held."""
        if self._held:
            data = self._held + data
        self.reached = data.endswith(self._mark)
        size = len(self._mark)
        while not data.endswith(self._mark[:size]):
            size -= 1
        self._held = data[len(data) - size :]
        return data[: len(data) - size] if size else data


def _layers(mounts: Sequence[Mount]) -> list[str] | None:
    """Return the directories of a snapshot's mounts, the topmost first; None if unknown."""
    if len(mounts) != 1:
        return None
    (mount,) = mounts
    if mount.type == "bind":
        return [mount.source]
    options = dict(o.split("=", 1) for o in mount.options if "=" in o)
    if mount.type != "overlay" or "lowerdir" not in options:
        return None
    upper = [options["upperdir"]] if "upperdir" in options else []
    return upper + options["lowerdir"].split(":")


def _overlay(mounts: Sequence[Mount], layers: Sequence[str]) -> tuple[str, str]:
    """Return a directory, and the option that lays directories over each other, seen from there.

    Relative to what they have in common: all options together have one page (trap 52).
    """
    if not layers:
        return "/", ""
    base = posixpath.commonpath([posixpath.dirname(layer) for layer in layers])
    lower = ":".join(posixpath.relpath(layer, base) for layer in layers)
    # Says where a rootless containerd notes what hides what.
    more = [option for option in mounts[0].options if option == "userxattr"]
    return base, ",".join([lower, *more])
