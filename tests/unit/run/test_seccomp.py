"""Docker's default seccomp profile as we give it to the runtime."""

from __future__ import annotations

import json
import re
from importlib.resources import files

import pytest

from serpentine.run.seccomp import seccomp

ARCHITECTURES = {
    "386": ["SCMP_ARCH_X86"],
    "amd64": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
    "arm": ["SCMP_ARCH_ARM"],
    "arm64": ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"],
    "ppc64le": ["SCMP_ARCH_PPC64LE"],
    "riscv64": ["SCMP_ARCH_RISCV64"],
    "s390x": ["SCMP_ARCH_S390X", "SCMP_ARCH_S390"],
}

# capability -> what it opens
CAPABILITIES = {
    "CAP_BPF": "bpf",
    "CAP_DAC_READ_SEARCH": "open_by_handle_at",
    "CAP_PERFMON": "perf_event_open",
    "CAP_SYSLOG": "syslog",
    "CAP_SYS_ADMIN": "bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie "
    "lsm_get_self_attr lsm_list_modules lsm_set_self_attr mount mount_setattr move_mount open_tree "
    "perf_event_open quotactl quotactl_fd setdomainname sethostname setns syslog umount umount2 "
    "unshare",
    "CAP_SYS_BOOT": "reboot",
    "CAP_SYS_CHROOT": "chroot",
    "CAP_SYS_MODULE": "delete_module finit_module init_module",
    "CAP_SYS_NICE": "get_mempolicy mbind set_mempolicy set_mempolicy_home_node",
    "CAP_SYS_PACCT": "acct",
    "CAP_SYS_PTRACE": "kcmp pidfd_getfd process_madvise",
    "CAP_SYS_RAWIO": "ioperm iopl",
    "CAP_SYS_TIME": "clock_settime clock_settime64 settimeofday stime",
    "CAP_SYS_TTY_CONFIG": "vhangup",
}

# architecture -> what it has that the others have not
NATIVE = {
    "386": "modify_ldt",
    "amd64": "arch_prctl modify_ldt",
    "arm": "arm_fadvise64_64 arm_sync_file_range breakpoint cacheflush set_tls sync_file_range2",
    "arm64": "arm_fadvise64_64 arm_sync_file_range breakpoint cacheflush set_tls sync_file_range2",
    "ppc64le": "swapcontext sync_file_range2",
    "riscv64": "riscv_flush_icache",
    "s390x": "s390_pci_mmio_read s390_pci_mmio_write s390_runtime_instr",
}

COMBINATIONS = [
    (capabilities, architecture)
    for architecture in [*ARCHITECTURES, "sparc"]
    for capabilities in [(), *((name,) for name in CAPABILITIES), tuple(CAPABILITIES)]
]


def allowed(capabilities=(), architecture="amd64") -> set[str]:
    """What is let through whatever its arguments are."""
    rules = seccomp(capabilities, architecture)["syscalls"]
    return {
        name
        for rule in rules
        if rule["action"] == "SCMP_ACT_ALLOW" and "args" not in rule
        for name in rule["names"]
    }


def rules_of(name, capabilities=(), architecture="amd64"):
    return [r for r in seccomp(capabilities, architecture)["syscalls"] if name in r["names"]]


def conditions(name, **options):
    rules = rules_of(name, **options)
    assert all(r["action"] == "SCMP_ACT_ALLOW" and len(r["args"]) == 1 for r in rules)
    return [(r["args"][0]["index"], r["args"][0]["op"], r["args"][0]["value"]) for r in rules]


@pytest.mark.parametrize(("capabilities", "architecture"), COMBINATIONS)
class TestEveryProfile:
    def test_refuses_what_it_does_not_name(self, capabilities, architecture):
        profile = seccomp(capabilities, architecture)
        assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
        assert profile["defaultErrnoRet"] == 1

    def test_is_plain_json(self, capabilities, architecture):
        profile = seccomp(capabilities, architecture)
        assert json.loads(json.dumps(profile)) == profile

    def test_has_the_shape_of_the_runtime_spec(self, capabilities, architecture):
        profile = seccomp(capabilities, architecture)
        assert profile.keys() - {"architectures"} == {
            "defaultAction",
            "defaultErrnoRet",
            "syscalls",
        }
        for rule in profile["syscalls"]:
            assert rule.keys() <= {"names", "action", "args", "errnoRet"}
            assert rule["names"]
            assert rule["action"] in ("SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO")
            for argument in rule.get("args", ()):
                assert argument.keys() - {"valueTwo"} == {"index", "value", "op"}
                assert argument["op"] in (
                    "SCMP_CMP_EQ",
                    "SCMP_CMP_LT",
                    "SCMP_CMP_GT",
                    "SCMP_CMP_MASKED_EQ",
                )

    def test_names_are_names_and_come_once(self, capabilities, architecture):
        rules = seccomp(capabilities, architecture)["syscalls"]
        names = [n for r in rules if "args" not in r for n in r["names"]]
        assert len(names) == len(set(names))
        assert all(re.fullmatch(r"_?[a-z][a-z0-9_]*[a-z0-9]", name) for name in names)
        # A rule with a condition beside one without: which of them counts?
        assert not set(names) & {n for r in rules if "args" in r for n in r["names"]}
        assert len({json.dumps(rule) for rule in rules}) == len(rules)
        assert rules[0]["names"] == sorted(rules[0]["names"])


class TestArchitectures:
    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_with_those_that_its_kernel_runs_too(self, name):
        assert seccomp([], name)["architectures"] == ARCHITECTURES[name]

    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_has_its_own_calls(self, name):
        assert allowed(architecture=name) - allowed(architecture="sparc") == {*NATIVE[name].split()}

    @pytest.mark.parametrize("name", ["sparc", "", "always", "CAP_SYS_ADMIN"])
    def test_unknown_ones_get_the_native_calls_that_all_have(self, name):
        profile = seccomp([], name)
        assert "architectures" not in profile
        assert profile["syscalls"] == seccomp([], "sparc")["syscalls"]
        assert "mount" not in allowed(architecture=name)


class TestCapabilities:
    @pytest.mark.parametrize("name", CAPABILITIES)
    def test_each_opens_its_calls_and_no_others(self, name):
        assert allowed([name]) - allowed() == {*CAPABILITIES[name].split()}
        assert allowed() <= allowed([name])

    def test_all_of_them_open_the_sum(self):
        opened = {call for calls in CAPABILITIES.values() for call in calls.split()}
        assert allowed(CAPABILITIES) == allowed() | opened

    @pytest.mark.parametrize("name", ["SYS_ADMIN", "cap_sys_admin", "CAP_CHOWN", "arm64", "always"])
    def test_others_open_nothing(self, name):
        assert seccomp([name], "amd64") == seccomp([], "amd64")

    def test_the_order_and_the_kind_of_collection_do_not_count(self):
        names = list(CAPABILITIES)
        expected = seccomp(names, "amd64")
        assert seccomp(names[::-1], "amd64") == expected
        assert seccomp(frozenset(names), "amd64") == expected


class TestCalls:
    def test_what_every_program_needs(self):
        assert allowed() >= {"read", "execve", "mmap", "futex", "openat2", "exit_group", "_llseek"}

    def test_what_no_container_gets(self):
        for refused in (
            "keyctl",
            "add_key",
            "kexec_load",
            "io_uring_setup",
            "userfaultfd",
            "swapon",
        ):
            assert refused not in allowed(CAPABILITIES)

    def test_debuggers_work_without_a_capability(self):
        assert allowed() >= {"ptrace", "process_vm_readv", "process_vm_writev"}

    def test_sockets_of_all_families_but_two(self):
        found = conditions("socket")
        assert {index for index, _, _ in found} == {0}
        compare = {
            "SCMP_CMP_LT": lambda a, b: a < b,
            "SCMP_CMP_EQ": lambda a, b: a == b,
            "SCMP_CMP_GT": lambda a, b: a > b,
        }
        refused = {f for f in range(64) if not any(compare[op](f, v) for _, op, v in found)}
        assert refused == {38, 40}

    def test_some_personalities(self):
        assert conditions("personality") == [
            (0, "SCMP_CMP_EQ", value) for value in (0, 8, 131072, 131080, 4294967295)
        ]


class TestNewNamespaces:
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_clone_makes_none_without_the_capability(self, architecture):
        (rule,) = rules_of("clone", architecture=architecture)
        assert rule["args"] == [
            {
                "index": 1 if architecture == "s390x" else 0,
                "value": 2114060288,
                "valueTwo": 0,
                "op": "SCMP_CMP_MASKED_EQ",
            }
        ]

    def test_clone3_seems_not_to_be_there(self):
        assert rules_of("clone3") == [
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}
        ]

    @pytest.mark.parametrize("name", ["clone", "clone3"])
    def test_with_the_capability_they_are_calls_like_others(self, name):
        (rule,) = rules_of(name, ["CAP_SYS_ADMIN"])
        assert rule["action"] == "SCMP_ACT_ALLOW"
        assert "args" not in rule


def test_the_result_is_the_callers():
    first = seccomp([], "amd64")
    before = json.dumps(first)
    first["syscalls"][0]["names"].clear()
    first["syscalls"].pop()
    first["architectures"].clear()
    assert json.dumps(seccomp([], "amd64")) == before


def test_the_file_is_sorted_and_says_nothing_twice():
    text = (files("serpentine.run") / "seccomp.txt").read_text()
    _, *sections = re.split(r"^\[(.+)\]$", text, flags=re.MULTILINE)
    groups = dict(zip(sections[::2], map(str.split, sections[1::2]), strict=True))
    assert len(groups) * 2 == len(sections)
    assert groups.keys() == {"always", *ARCHITECTURES, *CAPABILITIES}
    for name, calls in groups.items():
        assert calls == sorted(set(calls))
        assert name == "always" or not {*calls} & {*groups["always"]}
