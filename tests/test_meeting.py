"""How processes of a run find each other: by flags, the environment or SLURM; and what all are told where they cannot."""

import contextlib
import http.server
import socket
import threading
import time

import jax
import pytest

from pgjax.parallel import processes, rendezvous
from pgjax.run import devices
from tests import pair
from tests.compile_options import xla_flags

JOIN = """
import sys, time
from pgjax import distributed
begin = time.monotonic()
try:
    processes.initialize(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), timeout=float(sys.argv[4]))
except ValueError as error:
    print(error)
    sys.exit(0 if time.monotonic() - begin < float(sys.argv[4]) + 5 else 2)
sys.exit(3)
"""


def join(*rows):
    """Let processes try to join, each with its address, count, number and time; what they are told."""
    processes = [pair.start(["-c", JOIN, *map(str, row)]) for row in rows]
    ended = pair.finish(processes, seconds=120)
    assert [code for code, _, _ in ended] == [0] * len(rows), ended
    return [printed.strip() for _, printed, _ in ended]


def test_processes_that_disagree_about_their_number_are_told_so():
    address = f"localhost:{pair.free_port()}"
    first, second = join((address, 2, 0, 60), (address, 3, 1, 60))
    assert first == second and "process 0 says 2, process 1 says 3" in first


def test_processes_with_other_devices_or_settings_are_told_so():
    """Settings on which numbers depend: other random bits trained on in silence."""
    other_settings = (
        "jax_enable_x64 is False on process 0, True on process 1; "
        "jax_threefry_partitionable is True on process 0, False on process 1"
    )
    for differing, words in (
        ({"XLA_FLAGS": xla_flags(1)}, "equally many devices, but there are 2 on process 0, 1 on process 1"),
        ({"JAX_ENABLE_X64": "1", "JAX_THREEFRY_PARTITIONABLE": "0"}, other_settings),
    ):
        given = [f"localhost:{pair.free_port()}", "2"]
        processes = [
            pair.start(["-c", JOIN, *given, str(i), "60"], variables=differing if i else None) for i in range(2)
        ]
        told = [said.splitlines()[-1] for _, said, _ in pair.finish(processes, seconds=120)]
        assert told[0] == told[1] and words in told[0], told


def of_slurm(host, port, process, processes):
    """The variables that `srun` sets for a task, as far as jax reads them; the first host of the list is process 0's."""
    return {
        "SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": host, "SLURM_NTASKS": str(processes), "SLURM_PROCID": str(process),
        "SLURM_LOCALID": str(process), "JAX_COORDINATOR_PORT": str(port),
    }  # fmt: skip


JOIN_SLURM = """
import sys, time
from pgjax import distributed
begin = time.monotonic()
try:
    processes.initialize(timeout=float(sys.argv[1]))
except ValueError as error:
    print(error)
    sys.exit(1 if time.monotonic() - begin < float(sys.argv[1]) + 5 else 2)
print(processes.gather(processes.jax.process_index()))
"""


def join_slurm(*variables, timeout=60):
    """Let the tasks of a SLURM job join: exit code and last line of each; 2 where it took longer than it should."""
    tasks = [pair.start(["-c", JOIN_SLURM, str(timeout)], variables=one) for one in variables]
    return [(code, *printed.splitlines()[-1:]) for code, printed, _ in pair.finish(tasks, seconds=300)]


def test_tasks_of_slurm_find_each_other():
    port = pair.free_port()
    assert join_slurm(*(of_slurm("localhost", port, i, 2) for i in range(2))) == [(0, "[0, 1]")] * 2


def test_a_task_of_slurm_that_never_comes_is_named_on_all_that_are_there():
    port = pair.free_port()
    first, second = join_slurm(*(of_slurm("localhost", port, i, 3) for i in range(2)), timeout=12)
    assert first == second and first[0] == 1
    assert first[1].startswith(
        f"2 of 3 processes came to the coordinator localhost:{port} within 12 s; these did not: 2;"
    )
    assert first[1].endswith("JAX_COORDINATOR_ADDRESS, names another address)") and "SLURM" in first[1]


@pytest.mark.parametrize("host", ["no-such-host.invalid", "127.0.0.1"])
def test_a_first_host_of_slurm_that_is_not_there_is_named(host):
    """No such name, and a host where nobody listens."""
    port = pair.free_port()
    ((code, told),) = join_slurm(of_slurm(f"{host},b", port, 1, 2), timeout=2)
    assert code == 1
    assert told.startswith(f"process 1 of 2 could not reach the coordinator {host}:{port} within 2 s (")


JOIN_POD = """
import os
import jax._src.clusters.cloud_tpu_cluster as pod
from pgjax import distributed
pod.running_in_cloud_tpu_vm = True  # what jax says where it finds a TPU's chips
if "GCE_METADATA_IP" in os.environ:
    del os.environ["TPU_SKIP_MDS_QUERY"]  # which it sets where it finds none
processes.initialize(timeout=60)
print(processes.gather(processes.jax.process_index()))
"""


class Metadata(http.server.BaseHTTPRequestHandler):
    """What a host of a TPU pod is told about itself and the others."""

    def do_GET(self):
        told = {
            "agent-worker-number": str(self.server.worker),
            "worker-network-endpoints": "a:0:localhost,b:1:localhost",
        }
        found = told.get(self.path.rpartition("/")[2], "ACCELERATOR_TYPE: 'v5litepod-16'")
        self.send_response(200)
        self.end_headers()
        self.wfile.write(found.encode())

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def metadata_of(worker):
    with http.server.ThreadingHTTPServer(("localhost", 0), Metadata) as server:
        server.worker = worker
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {"GCE_METADATA_IP": f"localhost:{server.server_port}"}
        server.shutdown()


def test_hosts_of_a_tpu_pod_find_each_other_by_what_each_is_told():
    """As on Google Cloud's machines, by a metadata server, and as in its Kubernetes, by the environment."""
    none = dict.fromkeys(("MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID"), "")
    with metadata_of(0) as first, metadata_of(1) as second:
        kubernetes = [
            {"TPU_WORKER_HOSTNAMES": "localhost,localhost", "TPU_WORKER_ID": str(i), **none} for i in range(2)
        ]
        for told in ([first, second], kubernetes):
            port = {"JAX_COORDINATOR_PORT": str(pair.free_port())}
            hosts = [pair.start(["-c", JOIN_POD], variables=variables | port) for variables in told]
            for code, printed, errors in pair.finish(hosts, seconds=120):
                assert code == 0 and printed.splitlines()[-1] == "[0, 1]", errors


def meet_at(process, port, processes=2, timeout=1.0):
    """What a process of a run is told at the coordinator's port; nothing of jax is touched."""
    try:
        rendezvous.meet(f"localhost:{port}", processes, process, timeout)
    except ValueError as error:
        return str(error)
    return ""


def test_an_unreachable_coordinator_is_a_message_and_no_hang():
    begin, port = time.monotonic(), pair.free_port()
    assert "process 1 of 2 could not reach the coordinator localhost" in meet_at(1, port)
    assert "1 of 2 processes came to the coordinator" in meet_at(0, port)
    assert "process 3 of 4 could not reach the coordinator" in meet_at(3, port, processes=4)
    assert time.monotonic() - begin < 9


def meet_all(*given, timeout=60):
    """What processes that say these (process, processes) are told, once the first of them listens."""
    told, port = {}, pair.free_port()

    def one(i, process, processes):
        told[i] = meet_at(process, port, processes, timeout)

    threads = [threading.Thread(target=one, args=(i, *each)) for i, each in enumerate(given)]
    threads[0].start()
    knock(port).close()
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert len(told) == len(given)
    return [told[i] for i in range(len(given))]


def test_numbers_that_cannot_be_meant_are_told_to_all():
    """A second process 0 on the first one's host, and processes whose number lies beyond their count."""
    begin = time.monotonic()
    assert meet_all((0, 2), (0, 2)) == ["two processes have the number 0: each needs its own"] * 2
    words = (
        "the processes disagree about how many they are (process 0 says 2, process 1 says 1): give all the same number"
    )
    assert meet_all((0, 2), (1, 1)) == [words] * 2
    assert meet_all((0, 2), (2, 2)) == ["process 2 of 2: there is at least 1, and they are counted from 0"] * 2
    assert (
        meet_all((0, 3), (1, 3), (-1, 3)) == ["process -1 of 3: there is at least 1, and they are counted from 0"] * 3
    )
    assert meet_all((0, 2), (1, 2)) == ["", ""]
    assert time.monotonic() - begin < 50  # nobody waited for long
    with socket.socket() as other:  # no coordinator of ours
        other.bind(("", 0))
        assert "cannot be used here" in meet_at(0, other.getsockname()[1])


def knock(port):
    """Connect as soon as somebody listens: a thread that was started need not have come that far."""
    for _ in range(500):
        try:
            return socket.create_connection(("localhost", port), timeout=5)
        except ConnectionRefusedError:
            time.sleep(0.02)
    raise AssertionError("nobody came to listen")


def test_processes_meet_whatever_else_knocks():
    """A scanner at the port, a late coordinator, and two that claim one number."""
    port = pair.free_port()
    told: dict[int, str] = {}
    threads = [threading.Thread(target=lambda: told.update({1: meet_at(1, port, timeout=20)}))]
    threads[0].start()
    time.sleep(0.5)
    threads.append(threading.Thread(target=lambda: told.update({0: meet_at(0, port, timeout=20)})))
    threads[1].start()
    for thread in threads:
        thread.join(30)
    assert told == {0: "", 1: ""}

    told, port = {}, pair.free_port()
    threads = [threading.Thread(target=lambda: told.update({0: meet_at(0, port, processes=3, timeout=20)}))]
    threads += [
        threading.Thread(target=lambda i=i: told.update({i: meet_at(1, port, processes=3, timeout=20)})) for i in (1, 2)
    ]
    threads[0].start()
    with knock(port) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\n")
        for thread in threads[1:]:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert all("two processes have the number 1" in text for text in told.values()) and len(told) == 3


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"coordinator": "somewhere", "num_processes": 2, "process_id": 1}, "host:port"),
        ({"coordinator": "localhost:99999", "num_processes": 2, "process_id": 1}, "host:port"),
        ({"coordinator": "localhost:8476", "num_processes": 2, "process_id": 2}, "process 2 of 2"),
        ({"coordinator": "localhost:8476", "num_processes": 0, "process_id": 0}, "at least 1"),
        ({"coordinator": "localhost:8476"}, "number of processes"),
        ({}, "coordinator"),
        ({"init_timeout": 0.0}, "seconds"),
    ],
)
def test_flags_that_cannot_be_meant(given, words):
    with pytest.raises(ValueError, match=words):
        devices.start(devices.Flags(distributed=True, **given))


def test_flags_for_several_processes_need_the_flag_that_says_so():
    for name, value in {"coordinator": "localhost:1", "num_processes": 2, "process_id": 0}.items():
        with pytest.raises(ValueError, match=f"{name} .*--distributed"):
            devices.start(devices.Flags(**{name: value}))


def test_the_environment_fills_in_what_flags_leave_out(monkeypatch):
    asked = []
    monkeypatch.setattr(processes, "meet", lambda *given: asked.append(given))
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **options: asked.append(given))
    for name, value in {"COORDINATOR_ADDRESS": "10.0.0.1:8476", "NUM_PROCESSES": "4", "PROCESS_ID": "3"}.items():
        monkeypatch.setenv(f"JAX_{name}", value)
    processes.initialize(process=1, timeout=5)
    assert asked == [("10.0.0.1:8476", 4, 1, 5), ("10.0.0.1:8476", 4, 1)]
    monkeypatch.setenv("JAX_NUM_PROCESSES", "four")
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES='four'"):
        processes.initialize(timeout=5)
