"""Tasks: the processes of containers."""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.any_pb2 import Any
from google.protobuf.empty_pb2 import Empty

from serpentine.containerd._convert import mounts_to, time_from
from serpentine.containerd._proto import metrics_pb2
from serpentine.containerd._proto import tasks_pb2 as pb
from serpentine.containerd.channel import Channel
from serpentine.containerd.types import Mount, TaskExit, TaskInfo, TaskMetrics, TaskStatus
from serpentine.errors import NotFound

__all__ = ["Tasks"]

_SERVICE = "/containerd.services.tasks.v1.Tasks/"
_PROCESS = "types.containerd.io/opencontainers/runtime-spec/1/Process"


class Tasks:
    """The tasks of one namespace; each belongs to a container and has its id.

    A task is the container's first process; ``exec`` adds others to it.  An empty ``exec_id``
    means the first one.

    Standard streams are paths of FIFOs on containerd's machine; the other ends of those that
    are printed to must be open before the path is handed over (trap 46).  ``stdout`` and
    ``stderr`` are both there, or the same, or both empty; with ``terminal``, everything is
    printed to ``stdout``, and ``stderr`` is empty.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    async def create(
        self,
        container_id: str,
        rootfs: Iterable[Mount],
        *,
        stdin: str = "",
        stdout: str = "",
        stderr: str = "",
        terminal: bool = False,
        lease: str | None = None,
    ) -> int:
        """Mount a container's root file system, set its first process up, and return its pid.

        The process runs from ``start`` on.  There is no time limit: mounting may take long.
        Shield it from cancellation: while it waits for a pipe that nobody reads, containerd 1.6
        forgets a task that is given up, and leaves its shim and its mount for ever.
        Raises NotFound for the container, AlreadyExists when it has a task, and plain
        ContainerdError for what keeps the process from running: no such program, no such
        mount.  Nothing is left then.
        """
        request = pb.CreateTaskRequest(
            container_id=container_id,
            rootfs=mounts_to(rootfs),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            terminal=terminal,
        )
        answer = await self._channel.unary(
            _SERVICE + "Create", request, pb.CreateTaskResponse, lease=lease, timeout=None
        )
        return answer.pid

    async def start(self, container_id: str, exec_id: str = "") -> int:
        """Let a process run that was created or added, and return its pid; raises NotFound.

        Call ``wait`` first, and leave it waiting (trap 29).  For a process that was added, here
        comes what ``create`` says for the first one; delete it then, like one that ran.
        """
        request = pb.StartRequest(container_id=container_id, exec_id=exec_id)
        answer = await self._channel.unary(_SERVICE + "Start", request, pb.StartResponse)
        return answer.pid

    async def wait(self, container_id: str, exec_id: str = "") -> TaskExit:
        """Wait, without a time limit, until a process has ended; raises NotFound.

        It may already have, or not yet have been started.  When a process that was added could
        not be started, this says 0, without ``exited_at``.
        """
        request = pb.WaitRequest(container_id=container_id, exec_id=exec_id)
        answer = await self._channel.unary(
            _SERVICE + "Wait", request, pb.WaitResponse, timeout=None
        )
        return TaskExit(answer.exit_status, time_from(answer.exited_at))

    async def kill(
        self,
        container_id: str,
        signal: int,
        *,
        exec_id: str = "",
        all_processes: bool = False,
    ) -> None:
        """Send a signal to a process, or to every one of the container.

        Raises NotFound when the process is not there, or no longer, FailedPrecondition for one
        that was added and has not been started.
        """
        request = pb.KillRequest(
            container_id=container_id, exec_id=exec_id, signal=signal, all=all_processes
        )
        await self._channel.unary(_SERVICE + "Kill", request, Empty)

    async def delete(self, container_id: str) -> TaskExit:
        """Delete a task that ended or never started, unmount its root file system, end its shim.

        There is no time limit: unmounting writes to disk, and output that nobody reads is
        waited for.  Raises NotFound, FailedPrecondition while it runs.
        """
        request = pb.DeleteTaskRequest(container_id=container_id)
        answer = await self._channel.unary(
            _SERVICE + "Delete", request, pb.DeleteResponse, timeout=None
        )
        return TaskExit(answer.exit_status, time_from(answer.exited_at))

    async def delete_process(self, container_id: str, exec_id: str) -> TaskExit:
        """Delete a process that ``exec`` added and that ended or never started.

        There is no time limit, for output that nobody reads is waited for.  Raises NotFound,
        FailedPrecondition while it runs.
        """
        request = pb.DeleteProcessRequest(container_id=container_id, exec_id=exec_id)
        answer = await self._channel.unary(
            _SERVICE + "DeleteProcess", request, pb.DeleteResponse, timeout=None
        )
        return TaskExit(answer.exit_status, time_from(answer.exited_at))

    async def exec(
        self,
        container_id: str,
        exec_id: str,
        process: bytes,
        *,
        stdin: str = "",
        stdout: str = "",
        stderr: str = "",
        terminal: bool = False,
    ) -> None:
        """Add a process to a task; it runs from ``start`` on.

        ``process`` is the OCI runtime's description of one, as JSON.  Raises NotFound for the
        task, FailedPrecondition when it has ended, AlreadyExists when the id is taken.
        """
        request = pb.ExecProcessRequest(
            container_id=container_id,
            exec_id=exec_id,
            spec=Any(type_url=_PROCESS, value=process),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            terminal=terminal,
        )
        await self._channel.unary(_SERVICE + "Exec", request, Empty)

    async def close_io(self, container_id: str, exec_id: str = "") -> None:
        """Let a process read the end of its standard input once our end is closed.

        The shim holds the FIFO open as well, so closing ours alone is not enough.
        """
        request = pb.CloseIORequest(container_id=container_id, exec_id=exec_id, stdin=True)
        await self._channel.unary(_SERVICE + "CloseIO", request, Empty)

    async def resize_pty(
        self, container_id: str, width: int, height: int, exec_id: str = ""
    ) -> None:
        """Set the size of a process's terminal, in characters; raises NotFound.

        Nothing happens to one that has no terminal.
        """
        request = pb.ResizePtyRequest(
            container_id=container_id, exec_id=exec_id, width=width, height=height
        )
        await self._channel.unary(_SERVICE + "ResizePty", request, Empty)

    async def get(self, container_id: str, exec_id: str = "") -> TaskInfo:
        """Return what is known of a process; raises NotFound."""
        request = pb.GetRequest(container_id=container_id, exec_id=exec_id)
        answer = await self._channel.unary(_SERVICE + "Get", request, pb.GetResponse)
        return _info(answer.process)

    async def all(self) -> list[TaskInfo]:
        """Return all tasks, without the processes that were added to them."""
        request = pb.ListTasksRequest()
        answer = await self._channel.unary(_SERVICE + "List", request, pb.ListTasksResponse)
        return [_info(task) for task in answer.tasks]

    async def pids(self, container_id: str) -> list[int]:
        """Return the pids, on containerd's machine, of all that runs in a container.

        Raises NotFound.
        """
        request = pb.ListPidsRequest(container_id=container_id)
        answer = await self._channel.unary(_SERVICE + "ListPids", request, pb.ListPidsResponse)
        return [process.pid for process in answer.processes]

    async def metrics(self, container_id: str) -> TaskMetrics:
        """Return what the kernel counted for a container; raises NotFound."""
        request = pb.MetricsRequest(filters=[f'id=="{container_id}"'])
        answer = await self._channel.unary(_SERVICE + "Metrics", request, pb.MetricsResponse)
        for metric in answer.metrics:
            if metric.id == container_id:
                return TaskMetrics(
                    type_url=metric.data.type_url,
                    value=metric.data.value,
                    taken_at=time_from(metric.timestamp),
                )
        raise NotFound(f"containerd: there are no metrics of {container_id!r}")

    async def oom_kills(self, container_id: str) -> int:
        """Return how many processes of a container the kernel killed for want of memory.

        Raises NotFound, also when nothing is counted on this machine.
        """
        found = await self.metrics(container_id)
        if found.type_url.endswith("cgroups.v1.Metrics"):
            return metrics_pb2.V1.FromString(found.value).memory_oom_control.oom_kill
        return metrics_pb2.V2.FromString(found.value).memory_events.oom_kill


def _info(process: pb.Process) -> TaskInfo:
    return TaskInfo(
        id=process.id,
        pid=process.pid,
        status=TaskStatus(process.status),
        exit_status=process.exit_status,
        exited_at=time_from(process.exited_at),
        stdin=process.stdin,
        stdout=process.stdout,
        stderr=process.stderr,
        terminal=process.terminal,
    )
