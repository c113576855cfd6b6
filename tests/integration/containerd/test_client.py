"""The typed client against each real containerd: the traps of its API, by number."""

from __future__ import annotations

import asyncio
import gzip
import os
import signal
import socket
import subprocess
import sys
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from serpentine.containerd import (
    Containerd,
    Endpoint,
    ImageRecord,
    Resource,
    SnapshotKind,
)
from serpentine.containerd._proto import content_pb2 as pb
from serpentine.containerd.content import MESSAGE_SIZE
from serpentine.errors import (
    AlreadyExists,
    ContainerdError,
    DaemonUnreachable,
    FailedPrecondition,
    InvalidArgument,
    Locked,
    NotFound,
    OutOfRange,
    ResourceExhausted,
    Unavailable,
)
from serpentine.model.digest import Digest
from serpentine.model.documents import Descriptor
from tests.support.images import file, layer, noise
from tests.support.servers import ContainerdServer

DATA = noise("content", 3 * MESSAGE_SIZE + 12345)
DIGEST = Digest.of(DATA)


@pytest.fixture
async def client(containerd, namespace):
    async with Containerd(Endpoint.parse(containerd.address), namespace=namespace) as made:
        yield made


@pytest.fixture
async def lease(client):
    await client.leases.create("test", expires=timedelta(hours=1))
    return "test"


async def write(client, data=DATA, *, lease=None, ref="ref", expected=None, labels=None) -> None:
    expected = expected or Digest.of(data)
    async with client.content.writer(ref, total=len(data), expected=expected, lease=lease) as w:
        await w.write(data)
        await w.commit(labels)


def tar_of_nothing() -> bytes:
    return bytes(1024)


async def has_begun(mount) -> bool:
    """Tell whether something has been unpacked onto a mount."""
    return await asyncio.to_thread(lambda: any(Path(mount.source).iterdir()))


class TestConnection:
    async def test_version(self, client, containerd):
        assert (await client.check()).version == containerd.version
        assert (await client.wait_ready(5)).version == containerd.version

    async def test_no_such_socket(self, tmp_path):
        async with Containerd(Endpoint.parse(str(tmp_path / "none"))) as client:
            with pytest.raises(DaemonUnreachable, match="no such socket"):
                await client.check()
            with pytest.raises(DaemonUnreachable, match="no such socket"):
                await client.wait_ready(0.05)

    async def test_a_socket_that_nobody_serves(self, tmp_path):
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(tmp_path / "s"))
        async with Containerd(Endpoint.parse(str(tmp_path / "s"))) as client:
            with pytest.raises(DaemonUnreachable, match="nothing listens"):
                await client.check()

    async def test_a_file_that_is_no_socket(self, tmp_path):
        (tmp_path / "f").touch()
        async with Containerd(Endpoint.parse(str(tmp_path / "f"))) as client:
            with pytest.raises(DaemonUnreachable, match="nothing listens"):
                await client.check()

    async def test_something_that_is_no_containerd(self, tmp_path):
        async def answer(reader, writer):
            await reader.read(10)
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            writer.close()
            await writer.wait_closed()

        server = await asyncio.start_unix_server(answer, tmp_path / "s")
        async with server, Containerd(Endpoint.parse(str(tmp_path / "s"))) as client:
            with pytest.raises(DaemonUnreachable, match="no containerd"):
                await client.check(timeout=1)

    async def test_a_daemon_that_goes_away(self, containerd):
        with ContainerdServer(containerd.binary) as server:
            async with Containerd(Endpoint.parse(server.address)) as client:
                await client.check()
                server.kill()
                with pytest.raises(Unavailable):
                    await client.version()
                server.start()
                await client.wait_ready(10)

    async def test_no_namespace(self, client):
        """Trap 1: why it goes with every call."""
        client._channel.namespace = ""
        for call in (client.images.all, client.content.all, lambda: write(client)):
            with pytest.raises(FailedPrecondition, match="namespace is required"):
                await call()

    @pytest.mark.parametrize("name", ["k8s.io", "A_b-c.1", "x" * 76])
    async def test_our_rule_for_namespaces_is_containerds(self, client, name):
        client._channel.namespace = name
        assert await client.images.all() == []
        for wrong in ("a/b", "a..b", "-a", "x" * 77):
            client._channel.namespace = wrong
            with pytest.raises(InvalidArgument):
                await client.images.all()

    async def test_an_answer_of_more_than_four_megabytes(self, client):
        """Trap 12: Python's own limit."""
        labels = {f"label-{n}": "x" * 4000 for n in range(1200)}
        await client.leases.create("large", expires=timedelta(hours=1), labels=labels)
        [lease] = await client.leases.all()
        assert len(lease.labels) == 1201

    async def test_server_id(self, client):
        assert len(await client.introspection.server_id()) == 36

    async def test_platform_and_snapshotters(self, client):
        machine = {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]
        assert str(await client.introspection.host_platform()) == f"linux/{machine}"
        names = {plugin.id for plugin in await client.introspection.snapshotters()}
        assert {"overlayfs", "native"} <= names
        assert len(await client.introspection.plugins()) > len(names)


class TestLeases:
    async def test_expires_and_holds(self, client):
        before = datetime.now(UTC)
        lease = await client.leases.create("l", expires=timedelta(hours=1), labels={"a": "b"})
        until = datetime.fromisoformat(lease.labels["containerd.io/gc.expire"])
        assert timedelta(minutes=59) < until - before < timedelta(minutes=61)
        assert lease.labels["a"] == "b"
        assert [one.id for one in await client.leases.all()] == ["l"]
        held = Resource("sha256:" + "0" * 64, "content")
        await client.leases.add_resource("l", held)
        assert await client.leases.list_resources("l") == [held]
        await client.leases.delete_resource("l", held)
        await client.leases.delete_resource("l", held)
        assert await client.leases.list_resources("l") == []
        with pytest.raises(AlreadyExists):
            await client.leases.create("l", expires=timedelta(hours=1))
        await client.leases.delete("l", sync=True)
        await client.leases.delete("l")

    async def test_a_missing_lease_is_an_error_on_write(self, client):
        """Trap 2."""
        with pytest.raises(NotFound, match="lease"):
            await write(client, lease="none")
        with pytest.raises(NotFound, match="lease"):
            await client.snapshots("overlayfs").prepare("key", lease="none")

    async def test_what_nothing_holds_is_collected(self, client, lease):
        """Trap 3: all but ingests without a lease."""
        snapshots = client.snapshots("overlayfs")
        await write(client, lease=lease)
        assert await client.content.exists(DIGEST)
        await snapshots.prepare("key", lease=lease)
        more = {"total": len(DATA), "expected": Digest.of(b"other")}
        for name in ("leased", None):
            async with client.content.writer(f"ref-{name}", lease=lease if name else None, **more):
                pass
        await client.leases.delete(lease, sync=True)
        assert not await client.content.exists(DIGEST)
        assert await snapshots.all() == []
        assert [status.ref for status in await client.content.list_statuses()] == ["ref-None"]


class TestContent:
    async def test_write_and_read(self, client, lease):
        await write(client, lease=lease, labels={"a": "1"})
        info = await client.content.info(DIGEST)
        assert (info.size, info.labels, info.digest) == (len(DATA), {"a": "1"}, DIGEST)
        assert b"".join([part async for part in client.content.read(DIGEST)]) == DATA
        assert b"".join([p async for p in client.content.read(DIGEST, 10, 20)]) == DATA[10:30]
        assert await client.content.read_all(DIGEST, len(DATA)) == DATA
        with pytest.raises(ResourceExhausted):
            await client.content.read_all(DIGEST, 1000)
        assert [b.digest for b in await client.content.all()] == [DIGEST]
        assert await client.content.list_statuses() == []

    @pytest.mark.parametrize(
        "size", [0, 1, MESSAGE_SIZE - 1, MESSAGE_SIZE, MESSAGE_SIZE + 1, 3 * MESSAGE_SIZE]
    )
    async def test_sizes_around_a_message(self, client, lease, size):
        data = noise(size, size)
        await write(client, data, lease=lease)
        if size:
            assert await client.content.read_all(Digest.of(data), size) == data

    async def test_any_chunks_make_the_same_blob(self, client, lease):
        sizes = [1, 100_000, MESSAGE_SIZE, 7, 2 * MESSAGE_SIZE + 3]
        async with client.content.writer(
            "r", total=len(DATA), expected=DIGEST, lease=lease
        ) as writer:
            at = 0
            while at < len(DATA):
                size = sizes[at % len(sizes)]
                await writer.write(DATA[at : at + size])
                at = min(at + size, len(DATA))
                assert writer.offset == at
            await writer.commit()
        assert await client.content.read_all(DIGEST, len(DATA)) == DATA

    async def test_sha512(self, client, containerd, lease):
        """Trap 14; containerd 1.6 knows sha256 only, and says that the digest is another one."""
        data = b"x" * 1000
        if containerd.version.startswith("1."):
            with pytest.raises(FailedPrecondition, match="unexpected commit digest sha256:"):
                await write(client, data, lease=lease, expected=Digest.of(data, "sha512"))
            return
        await write(client, data, lease=lease, expected=Digest.of(data, "sha512"))
        assert (await client.content.info(Digest.of(data, "sha512"))).size == 1000

    async def test_present_is_said_on_open(self, client, lease):
        """Trap 8: and the blob is in the lease then."""
        await write(client, lease=lease)
        await client.leases.create("other", expires=timedelta(hours=1))
        with pytest.raises(AlreadyExists):
            await write(client, lease="other")
        await client.leases.delete(lease, sync=True)
        assert await client.content.exists(DIGEST)

    async def test_a_commit_that_somebody_else_won_is_a_success(self, client, lease):
        """Trap 8: but containerd does not put the blob into our lease then; we do."""
        await client.leases.create("other", expires=timedelta(hours=1))
        async with client.content.writer("a", total=len(DATA), expected=DIGEST, lease=lease) as a:
            await a.write(DATA)
            await write(client, lease="other", ref="b", labels={"theirs": "1"})
            await a.commit({"ours": "1"})
        await client.leases.delete("other", sync=True)
        assert (await client.content.info(DIGEST)).labels == {"ours": "1", "theirs": "1"}

    async def test_continues_where_an_earlier_attempt_stopped(self, client, lease):
        """Traps 4 and 5."""
        more = {"total": len(DATA), "expected": DIGEST, "lease": lease}
        async with client.content.writer("r", **more) as writer:
            await writer.write(DATA[: 2 * MESSAGE_SIZE])
            await writer._settle()
        assert (await client.content.status("r")).offset == 2 * MESSAGE_SIZE
        async with client.content._when_free("r", DIGEST, len(DATA), lease, wait=5) as writer:
            assert writer.offset == 2 * MESSAGE_SIZE
            await writer.write(DATA[writer.offset :])
            await writer.commit()
        assert await client.content.exists(DIGEST)

    async def test_a_commit_without_its_offset_truncates(self, client, lease):
        """Trap 4: what our commit must not do; and a gap is refused."""
        more = {"total": len(DATA), "expected": DIGEST, "lease": lease}
        async with client.content.writer("r", **more) as writer:
            await writer.write(DATA[:MESSAGE_SIZE])
            with pytest.raises(OutOfRange):
                await writer._send_data(MESSAGE_SIZE + 1, [b"x"])
                await writer._settle()
        async with client.content._when_free("r", DIGEST, len(DATA), lease, wait=5) as writer:
            assert writer.offset == MESSAGE_SIZE
            await writer._send(pb.COMMIT, offset=0)
            with pytest.raises(FailedPrecondition, match="size validation: 0 != "):
                await writer._settle()

    async def test_another_total_discards_what_is_there(self, client, lease):
        """Trap 5."""
        async with client.content.writer(
            "r", total=len(DATA), expected=DIGEST, lease=lease
        ) as writer:
            await writer.write(DATA[:MESSAGE_SIZE])
            await writer._settle()
        async with client.content._when_free("r", DIGEST, len(DATA) + 1, lease, wait=5) as writer:
            assert writer.offset == 0

    async def test_a_blob_of_another_namespace_needs_no_bytes(self, client, containerd, lease):
        """Trap 9: what the daemon has is there at the cost of a commit."""
        await write(client, lease=lease)
        async with Containerd(
            Endpoint.parse(containerd.address), namespace=f"{client.namespace}-2"
        ) as other:
            await other.leases.create("l", expires=timedelta(hours=1))
            assert not await other.content.exists(DIGEST)
            async with other.content.writer(
                "r", total=len(DATA), expected=DIGEST, lease="l"
            ) as writer:
                assert writer.offset == len(DATA)
                await writer.commit({"a": "b"})
            assert (await other.content.info(DIGEST)).labels == {"a": "b"}
            await other.leases.delete("l", sync=True)

    async def test_a_lock_that_is_found_late(self, client, containerd, lease, monkeypatch):
        """Traps 7 and 9: of such a blob, two clients may open the ref, and one may write it."""
        await write(client, lease=lease)
        waiting = asyncio.Event()
        async with Containerd(
            Endpoint.parse(containerd.address), namespace=f"{client.namespace}-2"
        ) as other:
            await other.leases.create("l", expires=timedelta(hours=1))
            more = {"total": len(DATA), "expected": DIGEST, "lease": "l"}
            original = other.content.wait_released

            async def wait_released(*arguments, **named):
                waiting.set()
                return await original(*arguments, **named)

            monkeypatch.setattr(other.content, "wait_released", wait_released)
            async with asyncio.timeout(30), asyncio.TaskGroup() as group:  # noqa: SIM117
                async with other.content.writer("r", **more) as first:
                    await first.reset()
                    async with other.content.writer("r", **more) as second:
                        with pytest.raises(Locked):
                            await second.reset()
                    group.create_task(
                        other.content.write_blob(
                            DATA, DIGEST, ref="r", labels={"a": "b"}, lease="l"
                        )
                    )
                    await waiting.wait()
            assert (await other.content.info(DIGEST)).labels == {"a": "b"}
            await other.leases.delete("l", sync=True)

    async def test_the_stream_is_read_to_its_end(self, client, lease):
        """Trap 10: a call that is not counts as cancelled."""
        async with client.content.writer(
            "r", total=len(DATA), expected=DIGEST, lease=lease
        ) as writer:
            await writer.write(DATA)
            assert writer.is_open
            await writer.commit()
            assert not writer.is_open
            assert await writer._call.receive() is None

    async def test_reset_begins_again(self, client, lease):
        more = {"total": len(DATA), "expected": DIGEST, "lease": lease}
        async with client.content.writer("r", **more) as writer:
            await writer.write(bytes(MESSAGE_SIZE + 5))
            await writer.reset()
            assert writer.offset == 0
            await writer.write(DATA)
            await writer.commit()
        assert await client.content.exists(DIGEST)

    async def test_a_wrong_digest_leaves_no_poison(self, client, lease):
        """Trap 6."""
        with pytest.raises(FailedPrecondition, match="digest"):
            await write(client, lease=lease, expected=Digest.of(b"other"))
        assert await client.content.list_statuses() == []
        with pytest.raises(FailedPrecondition, match="size"):
            async with client.content.writer(
                "r", total=len(DATA) + 1, expected=DIGEST, lease=lease
            ) as writer:
                await writer.write(DATA)
                await writer.commit()
        assert await client.content.list_statuses() == []
        await write(client, lease=lease)

    async def test_throwing_away_hashes_nothing(self, client, lease, monkeypatch):
        """Trap 13: opened with another total, what is there is not read again."""
        totals = []
        original = client.content.abort

        async def abort(ref):
            totals.append((await client.content.status(ref)).total)
            await original(ref)

        monkeypatch.setattr(client.content, "abort", abort)
        with pytest.raises(FailedPrecondition, match="digest"):
            await write(client, lease=lease, expected=Digest.of(b"other"))
        assert totals == [len(DATA) + 1]

    async def test_throwing_away_spares_the_next_writer(self, client, lease):
        """Trap 6: a bare abort would take the ingest from whoever has opened it since."""
        more = {"total": len(DATA), "expected": DIGEST, "lease": lease}
        async with client.content.writer("r", **more) as writer:
            await writer.write(DATA)
            with pytest.raises(Locked):
                await client.content._discard("r", **more)
            await writer.commit()
        assert await client.content.exists(DIGEST)

    async def test_one_writer_at_a_time(self, client, lease):
        """Trap 7: told apart from a lost connection, and free once the holder is gone."""
        more = {"total": len(DATA), "expected": DIGEST, "lease": lease}
        async with client.content.writer("r", **more):
            with pytest.raises(Locked):
                async with client.content.writer("r", **more):
                    pass
            status = await client.content.wait_released("r", patience=0.01)
            assert status.offset == 0
        async with client.content._when_free("r", DIGEST, len(DATA), lease, wait=5) as writer:
            await writer.write(DATA)
            await writer.commit()
        assert await client.content.wait_released("r", patience=5) is None

    async def test_small_blobs_with_labels(self, client, lease):
        """Traps 11 and 15: labels of a blob that is there are added, not replaced."""
        digest = Digest.of(b"{}")
        dotted = {"containerd.io/gc.ref.content.l.0": str(DIGEST)}
        for labels in ({"a": "1", **dotted}, {"b": "2"}):
            await client.content.write_blob(b"{}", digest, ref="x", labels=labels, lease=lease)
        assert (await client.content.info(digest)).labels == {"a": "1", "b": "2", **dotted}
        await client.content.write_blob(b"{}", digest, ref="x", labels={}, lease=lease)
        await client.content.update_labels(digest, {})
        assert (await client.content.info(digest)).labels == {"a": "1", "b": "2", **dotted}
        await client.content.update_labels(digest, {"a": None, "b": "3"})
        assert (await client.content.info(digest)).labels == {"b": "3", **dotted}
        with pytest.raises(InvalidArgument):
            await client.content.update_labels(digest, {"long": "x" * 4096})

    @pytest.mark.parametrize("call", ["info", "delete"])
    async def test_what_is_not_there(self, client, call):
        with pytest.raises(NotFound):
            await getattr(client.content, call)(DIGEST)
        with pytest.raises(NotFound):
            await client.content.read_all(DIGEST, 10)
        with pytest.raises(NotFound):
            await client.content.status("none")
        await client.content.abort("none")

    @pytest.mark.parametrize("stage", ["open", "write", "commit"])
    async def test_cancelled_it_lets_go(self, client, lease, stage):
        reached = asyncio.Event()

        async def work():
            async with client.content.writer(
                "r", total=len(DATA), expected=DIGEST, lease=lease
            ) as writer:
                if stage == "open":
                    reached.set()
                    await asyncio.Event().wait()
                for _ in range(2):
                    await writer.write(DATA[:MESSAGE_SIZE])
                if stage == "write":
                    reached.set()
                    await asyncio.Event().wait()
                reached.set()
                await writer.commit()

        task = asyncio.create_task(work())
        await reached.wait()
        task.cancel()
        await asyncio.wait([task])
        async with asyncio.timeout(5):
            # grpcio's own task for the end of a call needs a few turns of the loop.
            while len(asyncio.all_tasks()) > 1:  # noqa: ASYNC110
                await asyncio.sleep(0)
        async with client.content._when_free("r", DIGEST, len(DATA), lease, wait=5) as writer:
            if writer.offset:
                await writer.reset()
            await writer.write(DATA)
            await writer.commit()

    async def test_cancelled_at_any_turn_it_lets_go(self, client, lease):
        """At each await in turn, roughly: every few turns of the loop, from open to the end."""
        complaints = []
        asyncio.get_running_loop().set_exception_handler(lambda _, c: complaints.append(c))
        data = noise("turns", 16 * MESSAGE_SIZE)
        digest = Digest.of(data)
        turns, cancelled = 0, 0
        while True:
            task = asyncio.create_task(
                client.content.write_blob(data, digest, ref="ref", labels={"a": "b"}, lease=lease)
            )
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():
                break
            cancelled += 1
            turns += 1 + turns // 16
            if await client.content.exists(digest):
                await client.content.delete(digest)  # the commit was through when we cancelled
        await task
        assert cancelled > 10
        assert await client.content.read_all(digest, len(data)) == data
        async with asyncio.timeout(5):
            while len(asyncio.all_tasks()) > 1:  # noqa: ASYNC110
                await asyncio.sleep(0)
        assert complaints == []


class TestLock:
    async def test_one_at_a_time_and_nothing_left(self, client, containerd, namespace, lease):
        inside = 0

        async def use():
            nonlocal inside
            async with (
                Containerd(Endpoint.parse(containerd.address), namespace=namespace) as own,
                own.content.lock("l", lease=lease, wait=30),
            ):
                assert inside == 0
                inside += 1
                await own.version()
                inside -= 1

        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(use())
        assert await client.content.list_statuses() == []

    async def test_the_wait_has_an_end(self, client, lease, monkeypatch):
        async with client.content.lock("l", lease=lease, wait=1):
            with pytest.raises(Locked):
                async with client.content.lock("l", lease=lease, wait=0):
                    pass

        # Nor is it rounded up to our patience.
        monkeypatch.setattr("serpentine.containerd.content.PATIENCE", (40.0,))
        async with client.content.lock("l", lease=lease, wait=1), asyncio.timeout(20):
            with pytest.raises(Locked):
                async with client.content.lock("l", lease=lease, wait=0.1):
                    pass
        assert await client.content.list_statuses() == []

    async def test_the_ref_is_ours_until_the_stream_ends(self, client, lease):
        """The order in which ``lock`` lets go rests on this."""
        more = {"total": 0, "expected": DIGEST, "lease": lease}
        async with client.content.writer("l", **more):
            await client.content.abort("l")
            assert await client.content.list_statuses() == []
            with pytest.raises(Locked):
                async with client.content.writer("l", **more):
                    pass
        async with client.content._when_free("l", DIGEST, 0, lease, wait=5):
            pass

    async def test_a_lost_lock_is_not_taken_from_the_next_holder(self, client, lease):
        calls = []
        original = client.content._channel.duplex

        @asynccontextmanager
        async def recorded(*arguments, **more):
            async with original(*arguments, **more) as call:
                calls.append(call)
                yield call

        client.content._channel.duplex = recorded
        async with client.content.lock("l", lease=lease, wait=5):
            calls[0].cancel()  # as if the connection had broken
            second = client.content.lock("l", lease=lease, wait=5)
            await second.__aenter__()
        try:
            assert [status.ref for status in await client.content.list_statuses()] == ["l"]
        finally:
            await second.__aexit__(None, None, None)
        assert await client.content.list_statuses() == []

    async def test_a_killed_holder_lets_go(self, client, containerd, namespace, lease):
        code = f"""
import asyncio
from serpentine.containerd import Containerd, Endpoint
async def main():
    async with Containerd(Endpoint.parse({containerd.address!r}), namespace={namespace!r}) as c:
        async with c.content.lock("l", lease={lease!r}, wait=5):
            print("held", flush=True)
            await asyncio.Event().wait()
asyncio.run(main())
"""
        process = subprocess.Popen(  # noqa: ASYNC220 - the test waits for it in any case
            [sys.executable, "-c", code], stdout=subprocess.PIPE
        )
        try:
            assert process.stdout.readline() == b"held\n"
            process.send_signal(signal.SIGKILL)
            async with client.content.lock("l", lease=lease, wait=20):
                pass
        finally:
            process.wait()
            process.stdout.close()
        assert await client.content.list_statuses() == []


class TestSnapshotsAndDiff:
    @pytest.fixture
    def snapshots(self, client):
        return client.snapshots("overlayfs")

    async def put(self, client, lease, one) -> Descriptor:
        await write(client, one.blob, lease=lease, ref=one.digest)
        return Descriptor(
            media_type=one.media_type, digest=Digest.parse(one.digest), size=len(one.blob)
        )

    @pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
    async def test_a_layer_gives_its_diff_id(self, client, snapshots, lease, compression):
        """Trap 24: it is the caller's to compare."""
        one = layer([file("a", "1")], compression=compression)
        blob = await self.put(client, lease, one)
        mounts = await snapshots.prepare("key", lease=lease)
        applied = await client.diff.apply(blob, mounts, lease=lease)
        assert str(applied.digest) == one.diff_id
        await snapshots.commit("name", "key", lease=lease, labels={"a": "b"})
        info = await snapshots.stat("name")
        assert (info.kind, info.parent, info.labels["a"]) == (SnapshotKind.COMMITTED, "", "b")
        assert (await snapshots.usage("name")).inodes > 0
        assert [s.name for s in await snapshots.all()] == ["name"]
        await snapshots.update_labels("name", {"a": None, "c": "d"})
        await snapshots.update_labels("name", {})
        assert (await snapshots.stat("name")).labels == {"c": "d"}

    async def test_garbage_is_an_error_of_ours(self, client, snapshots, lease):
        """Traps 23 and 25."""
        await write(client, b"rubbish" * 100, lease=lease)
        mounts = await snapshots.prepare("key", lease=lease)
        for kind in ("application/vnd.oci.image.layer.v1.tar", "application/octet-stream"):
            blob = Descriptor(media_type=kind, digest=Digest.of(b"rubbish" * 100), size=700)
            with pytest.raises(ContainerdError):
                await client.diff.apply(blob, mounts, lease=lease)

    async def test_two_meanings_of_already_exists(self, snapshots, lease):
        """Traps 19 and 20."""
        labels = {"containerd.io/snapshot.ref": "target"}
        await snapshots.prepare("one", labels=labels, lease=lease)
        with pytest.raises(AlreadyExists):
            await snapshots.prepare("one", lease=lease)
        with pytest.raises(NotFound):
            await snapshots.stat("target")
        await snapshots.prepare("two", labels=labels, lease=lease)
        await snapshots.commit("target", "one", labels=labels, lease=lease)
        with pytest.raises(AlreadyExists):
            await snapshots.prepare("three", labels=labels, lease=lease)
        assert (await snapshots.stat("target")).name == "target"
        with pytest.raises(AlreadyExists):
            await snapshots.commit("target", "two", labels=labels, lease=lease)
        assert (await snapshots.stat("two")).kind is SnapshotKind.ACTIVE
        await snapshots.remove("two")

    async def test_parents(self, snapshots, lease):
        """Trap 20."""
        with pytest.raises(NotFound):
            await snapshots.prepare("key", "none", lease=lease)
        await snapshots.prepare("a", lease=lease)
        with pytest.raises(InvalidArgument):
            await snapshots.prepare("key", "a", lease=lease)
        await snapshots.commit("parent", "a", lease=lease)
        await snapshots.prepare("child", "parent", lease=lease)
        with pytest.raises(FailedPrecondition):
            await snapshots.remove("parent")
        assert (await snapshots.stat("child")).parent == "parent"
        assert await snapshots.mounts("child")
        assert await snapshots.view("view", "parent", labels={"a": "b"}, lease=lease)
        view = await snapshots.stat("view")
        assert (view.kind, view.parent, view.labels["a"]) == (SnapshotKind.VIEW, "parent", "b")
        with pytest.raises(AlreadyExists):
            await snapshots.view("view", "parent", lease=lease)

    async def test_a_parent_given_late(self, containerd, snapshots, lease):
        """Trap 21; containerd before 2.2 ignores it in any case."""
        for name in ("a", "b"):
            await snapshots.prepare(f"key-{name}", lease=lease)
            await snapshots.commit(name, f"key-{name}", lease=lease)
        await snapshots.prepare("has-one", "a", lease=lease)
        await snapshots.commit("on-a", "has-one", parent="b", lease=lease)
        assert (await snapshots.stat("on-a")).parent == "a"
        await snapshots.prepare("has-none", lease=lease)
        await snapshots.commit("late", "has-none", parent="b", lease=lease)
        assert (await snapshots.stat("late")).parent == (
            "" if containerd.version.startswith("1.") else "b"
        )

    @pytest.mark.parametrize(
        ("kind", "data", "diff_id"),
        [
            (".tar", tar_of_nothing(), "5f70bf18"),
            (".tar+gzip", gzip.compress(tar_of_nothing()), "5f70bf18"),
            (".tar", b"", "e3b0c442"),
            (".tar+zstd", gzip.compress(tar_of_nothing()), "5f70bf18"),
            (".tar", gzip.compress(tar_of_nothing()), "unexpected EOF"),
        ],
    )
    async def test_media_types_and_bytes(self, client, snapshots, lease, kind, data, diff_id):
        """Trap 23; the size in the descriptor is ignored."""
        await write(client, data, lease=lease)
        blob = Descriptor(
            media_type=f"application/vnd.oci.image.layer.v1{kind}",
            digest=Digest.of(data),
            size=12345,
        )
        mounts = await snapshots.prepare("key", lease=lease)
        if " " in diff_id:
            with pytest.raises(ContainerdError, match=diff_id) as error:
                await client.diff.apply(blob, mounts, lease=lease)
            assert error.value.code == "UNKNOWN"
        else:
            applied = await client.diff.apply(blob, mounts, lease=lease)
            assert applied.digest.hex.startswith(diff_id)

    async def test_a_cancelled_apply_stops_half_way(self, client, snapshots, lease):
        """Trap 26: the daemon stops, too; what is there is half a layer, to be removed."""
        # So many that it is not done before we have noticed that it has begun, on a busy machine.
        names = 50_000
        large = layer([file(f"f{n}") for n in range(names)], compression="none")
        blob = await self.put(client, lease, large)
        [mount] = await snapshots.prepare("key", lease=lease)
        task = asyncio.create_task(client.diff.apply(blob, [mount], lease=lease))
        async with asyncio.timeout(30):
            while not await has_begun(mount):  # noqa: ASYNC110 - containerd tells nobody
                await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert (await snapshots.stat("key")).kind is SnapshotKind.ACTIVE
        await snapshots.remove("key")
        with pytest.raises(NotFound):
            await snapshots.stat("key")

    async def test_diff_makes_a_layer(self, client, snapshots, lease):
        one = layer([file("a", "1")], compression="none")
        blob = await self.put(client, lease, one)
        lower = await snapshots.prepare("key", lease=lease)
        await client.diff.apply(blob, lower, lease=lease)
        await snapshots.commit("lower", "key", lease=lease)
        upper = await snapshots.prepare("upper", "lower", lease=lease)
        view = await snapshots.view("view", "lower", lease=lease)
        kind = "application/vnd.oci.image.layer.v1.tar"
        made = await client.diff.diff(
            view, upper, media_type=kind, ref="diff", labels={"a": "b"}, lease=lease
        )
        assert made.media_type == kind
        info = await client.content.info(made.digest)
        assert (info.size, info.labels["a"]) == (made.size, "b")


class TestImages:
    async def test_records(self, client, lease):
        await write(client, b"{}", lease=lease)
        target = Descriptor(media_type="x", digest=Digest.of(b"{}"), size=2)
        record = ImageRecord(name="r/a:1", target=target, labels={"a": "b"})
        made = await client.images.put(record)
        assert (made.target.digest, made.labels) == (target.digest, {"a": "b"})
        assert made.created_at
        other = Descriptor(media_type="y", digest=Digest.of(b"{}"), size=2)
        moved = await client.images.put(ImageRecord(name="r/a:1", target=other))
        assert (moved.target.media_type, moved.labels) == ("y", {"a": "b"}), "its labels stay"
        with pytest.raises(AlreadyExists):
            await client.images.create(record)
        labelled = ImageRecord(name="r/a:1", target=target, labels={"c": "d", "e": "f"})
        changed = await client.images.update(labelled, ["labels.c"])
        assert (changed.target.media_type, changed.labels) == ("y", {"a": "b", "c": "d"})
        with pytest.raises(InvalidArgument):
            await client.images.update(labelled, [])
        with pytest.raises(NotFound):
            await client.images.update(ImageRecord(name="none", target=target), ["target"])
        assert [image.name for image in await client.images.all()] == ["r/a:1"]
        assert client.namespace in await client.namespaces.all()
        await client.images.delete("r/a:1", sync=True)
        for call in (client.images.get, client.images.delete):
            with pytest.raises(NotFound):
                await call("r/a:1")

    async def test_labels_of_a_namespace(self, client, containerd, namespace):
        assert await client.namespaces.labels("no-such-namespace") == {}
        labels = {"containerd.io/defaults/snapshotter": "native"}
        await client.namespaces.create(namespace, labels)
        assert await client.namespaces.labels() == labels
        assert "snapshotter=native" in containerd.ctr("namespaces", "list", namespace="default")
        with pytest.raises(AlreadyExists):
            await client.namespaces.create(namespace)
        await client.namespaces.delete(namespace)
        with pytest.raises(NotFound):
            await client.namespaces.delete(namespace)


def test_a_path_of_the_test_suite_is_short_enough(containerd):
    assert len(containerd.address) < 60
    assert Path(containerd.address).is_socket()
