"""A short run of the fuzzer. `python -m tests.fuzz` runs long ones."""

from __future__ import annotations

import typing

import pytest

import afield
from afield.runtime.process.configuration import address_of
from afield.runtime.session import sessions
from afield.runtime.tools.security import listeners
from afield.runtime.wire import messages
from tests.fuzz.attacker import Attacker
from tests.fuzz.run import attack
from tests.helpers import poll, processes, traces

pytestmark = pytest.mark.slow


def test_whatever_is_sent_to_a_session_it_goes_on(no_runtime: None) -> None:
    outcome = attack(20261129, seconds=4.0)
    assert not outcome.problems, str(outcome)
    assert outcome.worked and sum(outcome.attacks.values()) > 100, str(outcome)


def test_each_message_costs_no_more_than_the_channel_that_it_comes_from(no_runtime: None) -> None:
    """38 of 61 kinds of messages once ended a driver."""
    with afield.init(num_cpus=1, log_to_driver=False):
        echo = afield.remote(lambda value: value)
        assert afield.get(echo.remote(1)) == 1
        (session,) = [one for one in sessions.find_sessions() if one.name == traces().name]
        lasting = {pid for pid, name in processes(traces()).items() if name != "afield-worker"}
        for address in listeners(session.name):
            attacker = Attacker("each", address, session.token())
            for kind in typing.get_args(messages.Message):
                attacker.send([attacker.value(kind)])
                attacker.send([messages.Register("driver", 1), attacker.value(kind)])
            attacker.close()
        assert lasting <= processes(traces()).keys()
        assert afield.get([echo.options(max_retries=-1).remote(n) for n in range(20)], timeout=60) == list(range(20))


def test_what_a_second_driver_asks_for_is_never_granted(no_runtime: None) -> None:
    """Nobody told of its end when its socket broke: the CPUs that it had leased never came back."""
    with afield.init(num_cpus=1):
        session = next(one for one in sessions.find_sessions() if one.name == traces().name)
        daemon = address_of(session.name, session.token())
        attacker = Attacker("second driver", daemon, session.token())
        for _ in range(5):
            attacker.send([messages.Register("driver", 1), messages.Demand(1, {"CPU": 10_000}, 1)])
        attacker.close()
        assert afield.get(afield.remote(lambda: 3).remote(), timeout=30) == 3
        assert poll(lambda: afield.available_resources().get("CPU") == 1, 30)
