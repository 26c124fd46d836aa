"""The daemon and the fork server: neither waits for the other, and a fork that fails costs one worker."""

from __future__ import annotations

import os
import resource

import psutil
import pytest

import afield


def fork_server() -> int:
    """The pid of this session's fork server."""
    (found,) = [child.pid for child in psutil.Process().children() if child.name() == "afield-fork"]
    return found


@pytest.mark.parametrize("spare", [0, 2])
def test_a_fork_that_fails_costs_its_worker_and_not_the_session(runtime: afield.ClusterInfo, spare: int) -> None:
    @afield.remote(num_cpus=0)
    class Local:
        def pid(self) -> int:
            return os.getpid()

    @afield.remote(runtime_env={"env_vars": {"OTHER": "1"}})
    def elsewhere() -> str:
        return os.environ["OTHER"]

    first = [Local.remote() for _ in range(3)]  # takes the workers that are there
    afield.get([actor.pid.remote() for actor in first], timeout=60)
    server = fork_server()
    limits = resource.prlimit(server, resource.RLIMIT_NOFILE)
    used = {int(number) for number in os.listdir(f"/proc/{server}/fd")}
    free = [number for number in range(max(used) + 4) if number not in used]
    resource.prlimit(server, resource.RLIMIT_NOFILE, (free[spare], limits[1]))  # so many more may be opened
    try:
        with pytest.raises(afield.ActorDiedError, match="could not be forked"):
            for actor in [Local.remote() for _ in range(6)]:
                afield.get(actor.pid.remote(), timeout=60)
        with pytest.raises(afield.errors.TaskUnschedulableError, match=r"3 attempts.*could not be forked"):
            afield.get(elsewhere.remote(), timeout=60)
        afield.get([actor.pid.remote() for actor in first], timeout=60)
    finally:
        resource.prlimit(server, resource.RLIMIT_NOFILE, limits)
    assert afield.get(Local.remote().pid.remote(), timeout=60) > 0
    assert afield.get(elsewhere.remote(), timeout=60) == "1"
    assert {int(number) for number in os.listdir(f"/proc/{server}/fd")} == used


@pytest.mark.slow
def test_many_workers_with_large_environments(runtime: afield.ClusterInfo) -> None:
    @afield.remote(num_cpus=0, runtime_env={"env_vars": {"LARGE": "x" * 60_000}})
    class Local:
        def pid(self) -> int:
            return os.getpid()

    actors = [Local.remote() for _ in range(400)]
    assert len(set(afield.get([actor.pid.remote() for actor in actors], timeout=200))) == 400
