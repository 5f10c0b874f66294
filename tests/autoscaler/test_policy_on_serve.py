"""1 -> 2 -> 1 replicas on a real Ray Serve, driven by real requests' latencies."""

import contextlib
import threading
import time

import pytest
import standin
from ray import cloudpickle

APP = "scaling"
DEPLOYMENT = "replica"
CLIENTS = 6
DEADLINE_S = 60.0


@pytest.fixture
def handle(serve_on_ray):
    cloudpickle.register_pickle_by_value(standin)  # Ray's workers cannot import from tests/
    try:
        yield serve_on_ray.run(standin.application(), name=APP, route_prefix=None)
    finally:
        cloudpickle.unregister_pickle_by_value(standin)
        serve_on_ray.delete(APP)


@contextlib.contextmanager
def clients(handle, count):
    """`count` clients, each with one request in flight at any time."""
    done = threading.Event()
    failures = []

    def client():
        try:
            while not done.is_set():
                standin.send(handle)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=client) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not failures


def running_replicas(serve):
    states = serve.status().applications[APP].deployments[DEPLOYMENT].replica_states
    return states.get("RUNNING", 0)


def reaches(serve, number):
    """Whether the deployment comes to `number` running replicas before the deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if running_replicas(serve) == number:
            return True
        time.sleep(0.1)
    return False


def test_a_second_replica_comes_with_the_load_and_leaves_with_it(serve_on_ray, handle):
    assert running_replicas(serve_on_ray) == 1
    with clients(handle, CLIENTS):
        assert reaches(serve_on_ray, 2)
    assert reaches(serve_on_ray, 1)


def test_one_client_at_a_time_keeps_one_replica(serve_on_ray, handle):
    """Its promise is kept, and its latency would not fall with a second replica."""
    with clients(handle, 1):
        deadline = time.monotonic() + 4
        while time.monotonic() < deadline:
            assert running_replicas(serve_on_ray) == 1
            time.sleep(0.2)
