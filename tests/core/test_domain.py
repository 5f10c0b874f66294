"""The budget domain: the tightest limit above a process, by whichever control groups it stands."""

from pathlib import Path

import pytest

from select_n_core.errors import HostMemoryError
from select_n_core.memory.available import available_host_bytes
from select_n_core.memory.domain import find_domain

GIB = 1 << 30
NODE_BYTES = 64 * GIB
V2 = "31 23 0:28 / /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
CPU_V1 = "33 31 0:30 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu"
UNLIMITED_V1 = "9223372036854771712"


class Machine:
    """A file system with what the kernel would say in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/meminfo", f"MemTotal:       {NODE_BYTES >> 10} kB\nMemFree: 1 kB\n")
        self.write("proc/sys/kernel/random/boot_id", "this-boot\n")
        self.groups("0::/", "1 0 0:1 / / rw - ext4 /dev/vda rw")

    def write(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def groups(self, lines: str, *mounts: str) -> None:
        """The process's control groups, and what is mounted."""
        self.write("proc/self/cgroup", lines + "\n")
        self.write("proc/self/mountinfo", "\n".join(mounts) + "\n")

    def limit(self, group: str, value: object, name: str = "memory.max") -> Path:
        self.write(f"sys/fs/cgroup/{group}/{name}", f"{value}\n")
        return self.root / "sys/fs/cgroup" / group

    def domain(self):
        return find_domain(self.root)


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


def test_without_a_limit_the_node_is_the_domain_and_a_tenth_is_left_to_others(machine):
    domain = machine.domain()
    assert (domain.id, domain.group) == ("this-boot-node", None)
    assert domain.limit_bytes == NODE_BYTES
    assert domain.capacity_bytes == int(0.9 * NODE_BYTES)


def test_the_tightest_group_on_the_way_is_the_domain(machine):
    machine.groups("0::/pods/one/app", V2)
    machine.limit("pods/one/app", "max")
    pod = machine.limit("pods/one", 8 * GIB)
    machine.limit("pods", 32 * GIB)
    domain = machine.domain()
    assert (domain.group, domain.limit_bytes) == (pod, 8 * GIB)
    assert domain.id == f"this-boot-group-{pod.stat().st_dev}-{pod.stat().st_ino}"


def test_of_equal_limits_the_outermost_is_where_more_processes_meet(machine):
    machine.groups("0::/pods/one/app", V2)
    machine.limit("pods/one/app", 8 * GIB)
    pod = machine.limit("pods/one", 8 * GIB)
    assert machine.domain().group == pod


def test_two_processes_under_one_limit_are_in_one_domain_and_others_are_not(machine):
    machine.limit("pods/one", 8 * GIB)
    machine.limit("pods/two", 8 * GIB)
    ids = []
    for group in ("/pods/one/app", "/pods/one/side", "/pods/two/app"):
        machine.groups(f"0::{group}", V2)
        ids.append(machine.domain().id)
    assert ids[0] == ids[1] != ids[2]


def test_a_limit_above_the_nodes_memory_limits_nothing(machine):
    machine.groups("0::/pods", V2)
    machine.limit("pods", 2 * NODE_BYTES)
    assert machine.domain().group is None


def test_version_1_has_a_hierarchy_for_memory(machine):
    machine.groups("5:cpu:/elsewhere\n4:memory:/pods/one\n0::/", CPU_V1, V1)
    name = "memory.limit_in_bytes"
    machine.limit("memory", UNLIMITED_V1, name)
    machine.limit("memory/pods", UNLIMITED_V1, name)
    pod = machine.limit("memory/pods/one", 4 * GIB, name)
    assert (machine.domain().group, machine.domain().limit_bytes) == (pod, 4 * GIB)


def test_a_mount_that_begins_below_the_root_is_entered_where_the_process_is(machine):
    machine.groups(
        r"0::/docker/a b/app", r"31 23 0:28 /docker/a\040b /sys/fs/cgroup rw - cgroup2 none rw"
    )
    machine.limit("", 16 * GIB)
    app = machine.limit("app", 2 * GIB)
    assert machine.domain().group == app


def test_a_path_outside_of_the_mount_leaves_its_root(machine):
    machine.groups("0::/../other/app", V2)
    machine.limit("", 16 * GIB)
    machine.limit("other/app", 1 * GIB)
    assert machine.domain().limit_bytes == 16 * GIB


def test_a_kernel_without_meminfo_is_an_error_that_says_so(machine):
    machine.write("proc/meminfo", "nothing\n")
    with pytest.raises(HostMemoryError, match="MemTotal"):
        machine.domain()


def test_this_process_is_in_a_domain_and_always_the_same():
    domain = find_domain()
    assert 0 < domain.capacity_bytes < domain.limit_bytes
    assert find_domain() == domain


class TestAvailable:
    @pytest.fixture(autouse=True)
    def node(self, machine):
        machine.write("proc/meminfo", f"MemTotal: {NODE_BYTES >> 10} kB\nMemAvailable: 1000 kB\n")

    def test_without_a_limit_it_is_what_the_node_has(self, machine):
        assert available_host_bytes(machine.root) == 1000 << 10

    def test_a_group_leaves_its_limit_less_what_is_used_and_cannot_be_reclaimed(self, machine):
        machine.groups("0::/pods/one", V2)
        machine.limit("pods", 500 << 10)
        machine.limit("pods", 400 << 10, "memory.current")
        stat = f"anon 5\nactive_file {30 << 10}\ninactive_file {20 << 10}"
        machine.limit("pods", stat, "memory.stat")
        assert available_host_bytes(machine.root) == 150 << 10

    def test_version_1_counts_the_groups_below_in_lines_of_their_own(self, machine):
        machine.groups("4:memory:/pods/one", V1)
        machine.limit("memory/pods", 500 << 10, "memory.limit_in_bytes")
        machine.limit("memory/pods", 400 << 10, "memory.usage_in_bytes")
        stat = (
            f"active_file 7\ninactive_file 7\ntotal_active_file {50 << 10}\ntotal_inactive_file 0"
        )
        machine.limit("memory/pods", stat, "memory.stat")
        assert available_host_bytes(machine.root) == 150 << 10
