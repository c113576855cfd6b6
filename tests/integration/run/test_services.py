"""Services beside a step: ready before it, reached by name, told when they fail, gone after it."""

from __future__ import annotations

import asyncio
import hashlib
import io
import ipaddress
import tarfile
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from serpentine import HealthCheck, RunOptions, Service
from serpentine.containerd.channel import Channel
from serpentine.containerd.containers import Containers
from serpentine.errors import (
    ContainerdError,
    InvalidSetting,
    ServiceFailed,
    StepFailed,
    StepTimeout,
)
from serpentine.events import ServiceOutput, ServiceReady, StepFinished, StepOutput, StepStarted
from serpentine.run.network import SERVICES_SUBNET, SUBNET
from tests.integration.run.conftest import KINDS, forget_states
from tests.support.images import OCI_LAYER, Layer, image, push
from tests.support.steps import bridges, step_image

# What Podman does in its own way, test_run_contained.py shows.
pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.parametrize(
        "machine", [kind for kind in KINDS if kind != "podman"], indirect=True, scope="module"
    ),
]

# Long before a test would be given up, long after anything here takes when it is right.
SOON = 15.0
FOREVER = "exec sleep 1000"
# Until it is not there any more; and before, until something listens: a service without a check is
# ready as soon as it runs.
GONE = "while ping -c 1 -W 1 db >/dev/null; do :; done"
CALL = "until nc -w 5 db 80 </dev/null; do :; done"


def service(state, args, *, health=None, keep=False, **options):
    """A service that needs no time to stop: the first process of a container ignores SIGTERM."""
    chosen = {"stop_signal": "KILL", **options}
    return Service(state, RunOptions(args=args, **chosen), health, keep)


@pytest.fixture
def created(monkeypatch):
    """The containers that were made, by their ids."""
    seen: list[str] = []
    original = Containers.create

    async def create(self, container_id, **more):
        seen.append(container_id)
        return await original(self, container_id, **more)

    monkeypatch.setattr(Containers, "create", create)
    return seen


@pytest.fixture
def engine(runner):
    return runner.engine


@pytest.fixture
def state(runner, created):
    """The state of an image with a shell; ``runner`` sees that nothing is left of any step."""
    yield runner.state
    assert runner.addresses(created) == []
    # Each is the last on its bridge.
    assert bridges(runner.machine.process) == []


@pytest.fixture
def states(engine):
    """Return a function that lists the states that steps have left."""

    async def states():
        snapshots = await engine.containerd.snapshots("overlayfs").all()
        return [found.name for found in snapshots if found.name.startswith("state-")]

    return states


@pytest.fixture
def run(engine, state):
    """Return a function that runs a step with services; nothing of it is committed."""

    async def run(args, services, **more):
        return await engine.run(state, args, services=services, **{"commit": False, **more})

    return run


@contextmanager
def soon():
    """Much sooner than if somebody waited for a time to be over."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < SOON


WEB = "mkdir /w; hostname >/w/index.html; exec httpd -f -p 80 -h /w"
ANSWERS = HealthCheck(command="wget -q -O - http://127.0.0.1/")
ANSWERS_HOSTS = HealthCheck(command="wget -q -O - http://127.0.0.1/hosts")


async def test_reached_by_its_name(run, state):
    names = ("web", "my_web", "www.example", "9lives")
    web = service(state, WEB, health=ANSWERS)
    script = "; ".join(f"wget -q -O - http://{name}/" for name in names)
    result = await run(script, dict.fromkeys(names, web))
    assert result.stdout == b"web\nmy-web\nwww.example\n9lives\n"
    assert {name: one.died for name, one in result.services.items()} == dict.fromkeys(names)
    assert result.services["web"].service is web


async def test_a_network_of_their_own(run, state):
    """Nobody else gets in, and all see the world: a step alone, or one with services of its own."""
    show = "ip -4 -o addr show | sed -n 's/.*inet \\(10[0-9.]*\\).*/\\1/p'"
    web = service(
        state, f"mkdir /w; {show} >/w/hosts; exec httpd -f -p 80 -h /w", health=ANSWERS_HOSTS
    )
    known: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
    asked = asyncio.Event()

    def on_event(event):
        if isinstance(event, StepOutput) and not known.done():
            known.set_result(event.data.decode().split())

    async def use(step):
        await asked.wait()

    async def others():
        outer, inner = await known
        ask = "timeout 1 wget -q -O - http://$0/hosts || echo nobody; echo $(ls /sys/class/net)"
        try:
            return [
                (await run(["sh", "-c", ask, address], services)).stdout.decode().splitlines()
                for address, services in [
                    (outer, {}),
                    (inner, {}),
                    (outer, {"web": web}),
                    (inner, {"web": web}),
                ]
            ]
        finally:
            asked.set()

    async with asyncio.TaskGroup() as group:
        first = group.create_task(
            run("wget -q -O - http://web/hosts; cat", {"web": web}, use=use, stdin=True,
                on_event=on_event)
        )  # fmt: skip
        found = group.create_task(others())
    outer, inner = first.result().stdout.decode().split()
    assert ipaddress.ip_address(outer) in ipaddress.ip_network(SUBNET)
    assert ipaddress.ip_address(inner) in ipaddress.ip_network(SERVICES_SUBNET)
    alone, beside = ["nobody", "eth0 lo"], ["nobody", "eth0 eth1 lo"]
    assert found.result()[:3] == [alone, alone, beside]
    # Each network has the same addresses: there, its own service answers.
    its_outer, its_inner, interfaces = found.result()[3]
    assert its_outer != outer
    assert its_inner == inner
    assert interfaces == "eth0 eth1 lo"


async def test_each_knows_those_before_it(run, state):
    web = service(state, "exec httpd -f -p 80 -h /etc", health=ANSWERS_HOSTS)
    second = service(
        state,
        "exec httpd -f -p 80 -h /etc",
        health=HealthCheck(command="wget -q -O - http://first/hosts"),
        extra_hosts={"elsewhere": "192.0.2.7"},
    )
    script = "for name in first second; do wget -q -O - http://$name/hosts; echo ---; done"
    result = await run(script, {"first": web, "second": second}, extra_hosts={"own": "192.0.2.8"})
    first, after, _ = result.stdout.decode().split("---\n")
    known = [dict(reversed(line.split()[:2]) for line in x.splitlines()) for x in (first, after)]
    assert "second" not in known[0]
    assert known[1]["first"] == known[0]["first"]
    assert known[1]["elsewhere"] == "192.0.2.7"
    assert "own" not in known[1], "that is the step's"


SLOWLY = f"sleep 0.5; echo made; touch /tmp/made; {FOREVER}"
IMAGES_OWN = {
    "Healthcheck": {"Test": ["CMD-SHELL", "test -e /tmp/made"], "Retries": 5},
    "User": "app",
}


@pytest.mark.parametrize("form", ["command", "shell", "image", "in place of the image's"])
async def test_awaited_until_it_is_healthy(run, engine, registry, state, form):
    health = {
        "command": HealthCheck(command=("stat", "/tmp/made")),
        "shell": HealthCheck(command='test -e "$MADE" && [ $(id -u) = 1000 ]'),
        "image": None,
        "in place of the image's": HealthCheck(command="test -e /tmp/made"),
    }[form]
    own = {"Healthcheck": {"Test": ["CMD", "nothing"], "Retries": 1}}
    if form == "image":
        own = IMAGES_OWN
    if "image" in form:
        pushed = push(registry, "services/own", form[:2], step_image(Env=["PATH=/bin"], **own))
        state = await engine.pull_image(pushed)
    events = []
    slow = service(state, SLOWLY, health=health, env={"MADE": "/tmp/made"}, user="1000:0")
    await run("echo step", {"slow": slow}, on_event=events.append)
    seen = [type(event) for event in events if not isinstance(event, StepFinished)]
    assert seen == [ServiceOutput, ServiceReady, StepStarted, StepOutput]
    assert events[1].seconds >= 0.5


async def test_without_a_check_it_is_ready_at_once(run, state):
    events = []
    await run("true", {"any": service(state, FOREVER)}, on_event=events.append)
    assert [type(e) for e in events] == [ServiceReady, StepStarted, StepFinished]


async def test_one_that_ends_before_it_is_ready(run, state):
    dying = service(
        state, "echo one; echo two >&2; exit 3", health=HealthCheck(command="false"), grace=60
    )
    with soon(), pytest.raises(ServiceFailed, match="'db' ended with status 3") as caught:
        await run("true", {"web": service(state, FOREVER, grace=60), "db": dying})
    assert sorted(caught.value.output.split()) == [b"one", b"two"]
    assert "one" in str(caught.value)
    assert "two" in str(caught.value)


async def test_one_that_runs_out_of_memory(run, state):
    greedy = service(state, "x=$(yes)", health=HealthCheck(command="false"), memory=16 << 20)
    with pytest.raises(ServiceFailed, match="'db' ran out of memory"):
        await run("true", {"db": greedy})


@pytest.mark.parametrize(
    ("check", "why"),
    [
        (HealthCheck(command="exit 4", interval=0.1, retries=4), "its check ended with status 4"),
        (
            HealthCheck(command="sleep 1000", interval=0.1, retries=1, timeout=0.3),
            "longer than 0.3",
        ),
        (HealthCheck(command=("none",), interval=0.1, retries=1), "could not be run.*none"),
    ],
    ids=["fails", "hangs", "is not there"],
)
async def test_one_that_is_never_ready(run, state, check, why):
    """It is not waited for at the end, either."""
    slow = service(state, f"echo slow; {FOREVER}", health=check, grace=60, stop_signal="TERM")
    with soon(), pytest.raises(ServiceFailed, match=rf"'db' was not ready after .*{why}") as caught:
        await run("true", {"db": slow})
    assert caught.value.output == b"slow\n"
    assert "it printed: slow" in str(caught.value)


async def test_one_is_asked_more_often_than_later(run, state):
    """An image's interval is for those who watch over it for days."""
    events = []
    slow = service(state, SLOWLY, health=HealthCheck(command="test -e /tmp/made", interval=50))
    await run("true", {"db": slow}, on_event=events.append)
    assert next(e for e in events if isinstance(e, ServiceReady)).seconds < SOON


async def test_one_that_cannot_be_started_is_named(run, state, created):
    with pytest.raises(ServiceFailed, match=r"'db' did not start: .*'nothing'") as caught:
        await run("true", {"web": service(state, FOREVER), "db": service(state, ["nothing"])})
    assert caught.value.exit_code == 125, "127 would be the step's own command"
    assert len(created) == 2, "and the step is not tried"


async def test_one_that_fails_while_the_step_runs_ends_it(run, state):
    """The step might wait for it for ever."""
    failing = service(state, "nc -l -p 80 </dev/null; echo overloaded; exit 4", keep=True)
    other = service(state, FOREVER, grace=60, stop_signal="TERM")
    with soon(), pytest.raises(ServiceFailed, match="'db' ended with status 4") as caught:
        await run(f"{CALL}; {FOREVER}", {"db": failing, "web": other}, commit=True)
    assert caught.value.output == b"overloaded\n"


@pytest.mark.parametrize("check", [False, True])
async def test_one_that_failed_is_why_the_step_failed(run, state, monkeypatch, check):
    """Also when the step is the first of which we hear."""
    original, waits, stopping = Channel.unary, [], asyncio.Event()

    async def unary(channel, path, *arguments, **more):
        if path.endswith(("Tasks/Get", "Tasks/Kill")):
            stopping.set()
        answer = await original(channel, path, *arguments, **more)
        if path.endswith("Tasks/Wait"):
            waits.append(path)
            # The first answer is the service's: it is held back until it is about to be stopped.
            if len(waits) == 1:
                await stopping.wait()
        return answer

    monkeypatch.setattr(Channel, "unary", unary)
    failing = service(state, "nc -l -p 80 </dev/null; echo overloaded; exit 4")
    with pytest.raises(ServiceFailed, match="'db' ended with status 4 while") as caught:
        await run(f"{CALL}; {GONE}; exit 9", {"db": failing}, check=check)
    assert caught.value.output == b"overloaded\n"
    assert isinstance(caught.value.__cause__, StepFailed) == check


async def test_one_that_is_done_does_not_end_the_step(run, state):
    once = service(state, "echo once; nc -l -p 80 </dev/null")
    result = await run(f"{CALL}; {GONE}; exit 9", {"db": once})
    assert result.exit_code == 9
    assert (result.services["db"].died, result.services["db"].output) == (0, b"once\n")


TRAP = """\
trap 'echo stopping TERM; sleep 2; echo bye; exit 0' TERM
trap 'echo stopping INT; sleep 2; echo bye; exit 0' INT
trap 'echo stopping USR1; sleep 2; echo bye; exit 0' USR1
touch /up; while :; do sleep 0.05; done
"""
IDLE = "while :; do sleep 0.05; done"
UP = HealthCheck(command="test -e /up")


async def test_stopped_after_the_step_side_by_side(engine, run, registry, state):
    pushed = push(registry, "services/stop", "1", step_image(StopSignal="SIGINT"))
    interrupted = await engine.pull_image(pushed)
    services = {
        "term": Service(state, RunOptions(args=TRAP), UP),
        "int": Service(interrupted, RunOptions(args=TRAP), UP),
        "usr": Service(interrupted, RunOptions(args=TRAP, stop_signal="SIGUSR1"), UP),
    }
    events = []
    result = await run("echo working; sleep 0.3; echo done", services, on_event=events.append)
    said = {name: one.output for name, one in result.services.items()}
    assert said == {
        "term": b"stopping TERM\nbye\n",
        "int": b"stopping INT\nbye\n",
        "usr": b"stopping USR1\nbye\n",
    }
    assert {one.died for one in result.services.values()} == {None}, "it was we who ended them"
    order = [e.data.split()[0] for e in events if isinstance(e, ServiceOutput)]
    assert order == [b"stopping"] * 3 + [b"bye"] * 3
    first = next(n for n, e in enumerate(events) if isinstance(e, ServiceOutput))
    last = max(n for n, e in enumerate(events) if isinstance(e, StepOutput | StepFinished))
    assert last < first


async def test_the_last_of_the_output_is_there(run, state):
    """More than a pipe holds, written while it stops."""
    script = f"trap 'head -c 3000000 /dev/zero; exit 0' TERM; touch /up; {IDLE}"
    long = Service(state, RunOptions(args=script, max_output=4_000_000), UP)
    result = await run("true", {"db": long})
    assert result.services["db"].output == bytes(3_000_000)


async def test_one_that_does_not_stop_is_killed(run, state):
    stubborn = Service(state, RunOptions(args=f"trap '' TERM; touch /up; {FOREVER}", grace=0.5), UP)
    with soon():
        result = await run("true", {"db": stubborn})
    assert result.services["db"].died is None


async def test_what_services_print_is_not_the_steps(run, state):
    chatty = service(state, f"echo out; echo err >&2; touch /up; {FOREVER}", health=UP)
    events = []
    result = await run("echo step; exit 3", {"db": chatty}, on_event=events.append)
    assert (result.exit_code, result.output) == (3, b"step\n")
    theirs = {(e.service, e.stream, e.data) for e in events if isinstance(e, ServiceOutput)}
    assert theirs == {("db", 1, b"out\n"), ("db", 2, b"err\n")}
    assert [e.data for e in events if isinstance(e, StepOutput)] == [b"step\n"]
    assert len([e for e in events if isinstance(e, StepStarted)]) == 1
    assert len([e for e in events if isinstance(e, StepFinished)]) == 1
    assert sorted(result.services["db"].output.split()) == [b"err", b"out"]


COUNT = f"echo x >>/count; wc -l </count; touch /tmp/made; {FOREVER}"


async def test_a_chain_of_steps_sees_what_is_kept(engine, run, registry, states):
    """And the health check of the image is still there, for a state that is no image's."""
    pushed = push(registry, "services/own", "kept", step_image(**IMAGES_OWN))
    own = await engine.pull_image(pushed)
    db = service(own, COUNT, keep=True, user="0", tmpfs=())
    first = await run("true", {"db": db})
    kept = first.services["db"].service
    assert kept == replace(db, state=kept.state)
    assert kept.state != own
    assert kept.state.healthcheck == own.healthcheck
    second = await run("true", {"db": kept})
    fork = await run("true", {"db": kept})
    third = await run("true", {"db": second.services["db"].service})
    results = (first, second, fork, third)
    assert [int(one.services["db"].output) for one in results] == [1, 2, 2, 3]
    assert len(set(await states())) == 4
    unkept = await run("true", {"db": replace(kept, keep=False)})
    assert unkept.services["db"].service.state == kept.state
    assert len(await states()) == 4


async def test_nothing_is_kept_when_the_step_raises(run, state, states):
    """Nobody would know of it."""
    db = service(state, FOREVER, keep=True)
    with pytest.raises(StepFailed):
        await run("exit 1", {"db": db}, check=True)
    with pytest.raises(StepTimeout):
        await run(FOREVER, {"db": db}, timeout=0.5, stop_signal="KILL")
    assert await states() == []
    # Without, it is told in the result, and so is what is kept.
    assert (await run("exit 1", {"db": db})).services["db"].service.state != state
    assert len(await states()) == 1


@pytest.mark.parametrize(
    ("names", "why"),
    [
        *(((name,), "is not a name") for name in ("", "a b", "-a", "a-", "a/b", "ü", "a\n")),
        (("x" * 64,), "is not a name"),
        *(((name,), "something else") for name in ("7", "10.0.0.1", "db.0x1f", "LocalHost")),
        (("ok", "ip6-loopback"), "something else"),
        (("db", "DB"), "two services"),
    ],
)
async def test_names_that_cannot_be(run, state, created, names, why):
    events = []
    with pytest.raises(InvalidSetting, match=why):
        await run("true", dict.fromkeys(names, service(state, FOREVER)), on_event=events.append)
    assert (created, events) == ([], [])


async def test_networks_that_do_not_reach_them(run, state, created):
    ok = service(state, FOREVER)
    for network in ("none", "host"):
        with pytest.raises(InvalidSetting, match="does not reach services"):
            await run("true", {"ok": ok}, network=network)
        with pytest.raises(InvalidSetting, match="'db' cannot be reached"):
            await run("true", {"ok": ok, "db": service(state, FOREVER, network=network)})
    assert created == []


class AtCall:
    """Does something when the n-th call of a method is about to be made."""

    def __init__(self, monkeypatch, method: str, number: int, act) -> None:
        self.happened = False
        seen = 0
        original = Channel.unary

        async def unary(channel, path, *arguments, **more):
            nonlocal seen
            if path.endswith(method):
                seen += 1
                if seen == number:
                    self.happened = True
                    act()
            return await original(channel, path, *arguments, **more)

        monkeypatch.setattr(Channel, "unary", unary)


# Two services and then the step: what is asked of containerd on the way, and for which of them.
PHASES = [
    *(("Snapshots/Prepare", n) for n in (1, 2, 3)),
    *(("Containers/Create", n) for n in (2, 3)),
    *(("Tasks/Create", n) for n in (1, 2, 3)),
    *(("Tasks/Start", n) for n in (1, 2)),
    *(("Tasks/Exec", n) for n in (1, 2)),
    *(("Snapshots/Commit", n) for n in (1, 2, 3)),  # the step's, and those that are kept
    *(("Tasks/Kill", n) for n in (1, 2)),  # to stop them
    *(("Leases/Delete", n) for n in (1, 2, 3)),
]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("way", ["cancelled", "failing"])
async def test_in_the_middle_nothing_is_left(runner, engine, run, state, monkeypatch, way):
    db = service(state, f"touch /up; {FOREVER}", health=UP, keep=True)

    def fail():
        raise ContainerdError("injected")

    for method, number in PHASES:
        with monkeypatch.context() as patch:
            task = asyncio.create_task(run("echo >/new", {"a": db, "b": db}, commit=True))
            act = task.cancel if way == "cancelled" else fail
            at = AtCall(patch, method, number, act)
            await asyncio.wait([task])
        assert at.happened, f"there was no call {number} of {method}"
        if way == "cancelled":
            assert task.cancelled(), f"call {number} of {method}"
        elif task.exception() is None:
            # A check that fails is only tried again.
            assert method == "Tasks/Exec", f"call {number} of {method}"
            await forget_states(engine.containerd)
        else:
            assert "injected" in str(task.exception())
        now = await runner.left()
        assert (now.containers, now.tasks, now.leases) == ([], [], []), f"{number} of {method}"
        assert [s for s in now.snapshots if not s.startswith("sha256:")] == [], (
            f"call {number} of {method}"
        )


async def test_cancelled_while_it_waits(run, state, states):
    """For one to be ready, for the step, for one to stop: it does not wait then."""
    db = Service(state, RunOptions(args=f"touch /up; {FOREVER}", grace=60), UP, keep=True)
    never = replace(db, health=HealthCheck(command="echo >/proc/1/fd/1; false"))
    for awaited, one in ((ServiceOutput, never), (StepOutput, db), (StepFinished, db)):
        args = "echo hello" if awaited is StepFinished else f"echo hello; {FOREVER}"
        reached = asyncio.Event()

        def tell(event, kind=awaited, reached=reached):
            if isinstance(event, kind):
                reached.set()

        with soon():
            task = asyncio.create_task(run(args, {"db": one}, commit=True, on_event=tell))
            await reached.wait()
            task.cancel()
            await asyncio.wait([task])
        assert task.cancelled()
        assert await states() == []


# --- a real database -----------------------------------------------------------------------

POSTGRES = Path(__file__).parents[3] / ".cache" / "postgres.tar"
PSQL = ("--host=db", "--no-psqlrc", "--quiet", "--tuples-only", "--no-align")
DATA = "/var/lib/postgresql/data"


@pytest.fixture(scope="session")
def postgres_image():
    """Debian's PostgreSQL, as it was installed; scripts/setup-tests makes it."""
    if not POSTGRES.exists():
        pytest.fail(f"{POSTGRES} not found: run 'make test' as root")
    data = POSTGRES.read_bytes()
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        server = next(one.name for one in tar if one.name.endswith("/bin/postgres"))
    programs = server.removeprefix(".").removesuffix("/postgres")
    config = {
        "Env": [f"PATH={programs}:/usr/bin:/bin", f"PGDATA={DATA}"],
        "User": "postgres",
        "StopSignal": "SIGINT",  # the fast shutdown: it does not wait for clients to leave
        "Healthcheck": {"Test": ["CMD", "pg_isready", "--quiet"], "Interval": 1_000_000_000},
    }
    return image([Layer(data, digest, OCI_LAYER)], config=config)


@pytest.fixture(scope="module")
def pulled(machine, postgres_image):
    return machine.pull("postgres", postgres_image)


async def test_a_database(pulled, engine):
    """Done when 3: two steps that see each other's rows, and a fork that does not."""
    setup = f"initdb --no-sync && echo host all all {SERVICES_SUBNET} trust >>{DATA}/pg_hba.conf"
    made = await engine.run(pulled, setup, network="none", check=True)
    server = RunOptions(args=["postgres", "-c", "listen_addresses=*"])
    empty = Service(made.state, server, keep=True)

    async def psql(db, sql):
        result = await engine.run(
            pulled,
            ["psql", *PSQL, f"--command={sql}"],
            services={"db": db},
            commit=False,
        )
        assert result.exit_code == 0, result.output
        one = result.services["db"]
        assert b"received fast shutdown request" in one.output
        assert b"database system is shut down" in one.output, "to the last line"
        assert b"not properly shut down" not in one.output
        return one.service, result.stdout.decode().split()

    first, _ = await psql(empty, "CREATE TABLE t (name text); INSERT INTO t VALUES ('first')")
    second, _ = await psql(first, "INSERT INTO t VALUES ('second')")
    fork, seen = await psql(first, "INSERT INTO t VALUES ('fork'); TABLE t")
    assert seen == ["first", "fork"]
    _, seen = await psql(second, "TABLE t")
    assert seen == ["first", "second"]
    _, seen = await psql(fork, "TABLE t")
    assert seen == ["first", "fork"]
    _, seen = await psql(empty, "SELECT count(*) FROM pg_tables WHERE tablename = 't'")
    assert seen == ["0"]
