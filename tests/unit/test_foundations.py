"""Errors, events, the pieces of concurrency, and who may import whom."""

from __future__ import annotations

import ast
import asyncio
from pathlib import Path

import pytest

import serpentine
from serpentine import errors, events
from serpentine._concurrency import KeyedLock, shielded, task_group, unbroken
from serpentine.errors import ContainerdError, SerpentineError

SOURCE = Path(errors.__file__).parent


class TestErrors:
    def test_every_error_is_in_the_tree_that_the_module_draws(self):
        for name in errors.__all__:
            assert issubclass(getattr(errors, name), SerpentineError)
            assert name in errors.__doc__
        defined = {n for n, v in vars(errors).items() if isinstance(v, type)}
        assert defined == set(errors.__all__)

    def test_one_line_whatever_is_put_in(self):
        error = SerpentineError("a\nb\t c", hint="d\ne")
        assert (str(error), error.hint) == ("a b c", "d e")

    def test_facts_are_attributes(self):
        assert errors.RateLimited("x", host="h", retry_after=3.0).retry_after == 3.0
        assert errors.RegistryNotFound("x", host="h", image="i").host == "h"
        assert errors.PlatformNotFound("x", available=("a",)).available == ("a",)
        assert errors.NotFound("x").code == "NOT_FOUND"
        assert ContainerdError("x", code="ABORTED").code == "ABORTED"


class TestEvents:
    def test_each_has_a_name_of_its_own(self):
        kinds = [
            kind
            for kind in vars(events).values()
            if isinstance(kind, type) and issubclass(kind, events.Event)
        ]
        assert len(kinds) > 8
        assert len({kind.name for kind in kinds}) == len(kinds)

    def test_immutable_and_plain(self):
        event = events.PullStarted(image="a")
        with pytest.raises(AttributeError):
            event.image = "b"
        assert event.to_dict() == {"event": "pull_started", "image": "a"}


class TestShielded:
    async def test_runs_to_its_end_while_the_caller_is_cancelled(self):
        started, finish, done = asyncio.Event(), asyncio.Event(), []

        async def clean_up():
            started.set()
            await finish.wait()
            done.append(True)

        task = asyncio.create_task(shielded(clean_up(), timeout=5))
        await started.wait()
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        assert not task.done()
        finish.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert done == [True]

    async def test_returns_and_raises_what_the_work_does(self):
        async def give():
            return 3

        async def fail():
            raise SerpentineError("no")

        assert await shielded(give(), timeout=1) == 3
        with pytest.raises(SerpentineError, match="no"):
            await shielded(fail(), timeout=1)

    async def test_has_an_end(self):
        with pytest.raises(TimeoutError):
            await shielded(asyncio.Event().wait(), timeout=0.01)


class TestUnbroken:
    @pytest.mark.parametrize("fails", [False, True])
    @pytest.mark.parametrize("times", [1, 2])
    async def test_is_cancelled_when_the_work_is_done(self, fails, times):
        started, finish, done = asyncio.Event(), asyncio.Event(), []

        async def work():
            started.set()
            await finish.wait()
            done.append(True)
            if fails:
                raise SerpentineError("no")

        task = asyncio.create_task(unbroken(work(), patience=5))
        await started.wait()
        for _ in range(times):
            task.cancel()
            for _ in range(5):
                await asyncio.sleep(0)
            assert not task.done()
        finish.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert done == [True]

    async def test_patience_ends(self):
        started, told = asyncio.Event(), []

        async def work():
            started.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                told.append("cancelled")
                raise

        task = asyncio.create_task(unbroken(work(), patience=0.01))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0)
        assert told == ["cancelled"]

    async def test_without_a_cancellation_there_is_no_limit(self):
        async def give():
            await asyncio.sleep(0.05)
            return 3

        async def fail():
            raise SerpentineError("no")

        assert await unbroken(give(), patience=0.001) == 3
        with pytest.raises(SerpentineError, match="no"):
            await unbroken(fail(), patience=1)


class TestTaskGroup:
    async def test_raises_our_error_and_keeps_the_others_as_notes(self):
        async def fail(error):
            raise error

        with pytest.raises(SerpentineError, match="ours") as caught:
            async with task_group() as group:
                group.create_task(fail(ValueError("foreign")))
                group.create_task(fail(SerpentineError("ours")))
        assert any("foreign" in note for note in caught.value.__notes__)

    async def test_without_ours_the_first(self):
        async def fail():
            raise ValueError("x")

        with pytest.raises(ValueError, match="x"):
            async with task_group() as group:
                group.create_task(fail())


class TestKeyedLock:
    async def test_one_at_a_time_per_key_and_forgotten_afterwards(self):
        lock, inside = KeyedLock(), []

        async def use(key, number):
            async with lock(key):
                assert key not in inside
                inside.append(key)
                await asyncio.sleep(0)
                inside.remove(key)

        async with asyncio.TaskGroup() as group:
            for number in range(20):
                group.create_task(use(number % 3, number))
        assert len(lock) == 0

    async def test_a_cancelled_holder_hands_over(self):
        lock, held, got = KeyedLock(), asyncio.Event(), asyncio.Event()

        async def leader():
            async with lock("k"):
                held.set()
                await asyncio.Event().wait()

        async def waiter():
            async with lock("k"):
                got.set()

        first = asyncio.create_task(leader())
        await held.wait()
        second = asyncio.create_task(waiter())
        third = asyncio.create_task(waiter())
        await asyncio.sleep(0)
        third.cancel()
        first.cancel()
        await second
        await asyncio.wait([first, third])
        assert got.is_set()
        assert len(lock) == 0


# --- who may import whom ---------------------------------------------------------------------

# room -> rooms that it may import, besides itself
ALLOWED = {
    "errors": set(),
    "_version": set(),
    "_concurrency": {"errors"},
    "_session": set(),
    "settings": {"errors"},
    "events": set(),
    "model": {"errors"},
    "registry": {"errors", "events", "model", "_concurrency"},
    "containerd": {"errors", "model", "_concurrency"},
    "daemon": {"errors", "events", "settings", "containerd", "_concurrency", "_version"},
    "pull": {"errors", "events", "model", "registry", "containerd", "_concurrency", "_session"},
}
ALLOWED["run"] = {"errors", "events", "model", "containerd", "_concurrency", "_session"}
ALLOWED["upkeep"] = {*ALLOWED["pull"], "pull"}
ALLOWED["history"] = {"errors", "events", "model", "_version"}
ALLOWED["telemetry"] = {"errors", "events", "history", "_version"}
ALLOWED["engine"] = {*ALLOWED, "pull", "daemon", "run"}
ALLOWED["doctor"] = ALLOWED["daemon"] - {"_concurrency"} | {"registry", "daemon"}
ALLOWED["cli"] = {
    "",
    "engine",
    "doctor",
    "errors",
    "events",
    "settings",
    "model",
    "daemon",
    "run",
    "upkeep",
    "_version",
    "_concurrency",
}
ALLOWED["__main__"] = {"cli"}
# The public API only names where things live; the imports are for type checkers.
ALLOWED[""] = {"_version", "engine", "errors", "events", "settings", "model", "pull", "run"}
ALLOWED[""] |= {"upkeep", "history"}

HOMES = {
    "grpc": {"containerd"},
    "aiohttp": {"registry", "daemon"},
    "aiodocker": {"daemon"},
    "opentelemetry": {"telemetry", "engine"},
    "cryptography": {"daemon"},
    "isal": {"pull"},
    "backports": {"pull"},
    "rich": {"cli"},
    "click": {"cli"},
}


def modules():
    for path in sorted(SOURCE.rglob("*.py")):
        if "_proto" not in path.parts:
            yield path, ast.parse(path.read_text())


# Read once, on import: ast.parse of Python 3.11.2 (Debian's) can fail with a SystemError when
# hypothesis and the collector run in the same process (cpython 106905).
MODULES = list(modules())


def room_of(path: Path) -> str:
    first = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imported(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            if node.module == "serpentine":
                public = serpentine.__all__
                for alias in node.names:
                    yield "serpentine" if alias.name in public else f"serpentine.{alias.name}"
            else:
                yield node.module or ""


@pytest.mark.parametrize(("path", "tree"), MODULES, ids=lambda v: getattr(v, "stem", ""))
def test_imports_go_downwards_only(path, tree):
    room = room_of(path)
    for name in imported(tree):
        top, *rest = name.split(".")
        if top == "serpentine":
            target = rest[0] if rest else ""
            assert target == room or target in ALLOWED[room], f"{path.name} imports {name}"
        elif top in HOMES:
            assert room in HOMES[top], f"{top} belongs into {HOMES[top]} only"


def test_tasks_live_in_task_groups():
    for path, tree in MODULES:
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner = ast.unparse(node.func.value)
            name = node.func.attr
            if name in ("gather", "ensure_future") and owner == "asyncio":
                pytest.fail(f"{path}: asyncio.{name}")
            if name == "create_task" and path.name != "_concurrency.py":
                assert owner == "group", f"{path}: {owner}.create_task"
