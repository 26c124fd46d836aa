"""`register_serializer` and `get_node_ip_address` by behaviour."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

import afield
from afield.util import deregister_serializer, get_node_ip_address, register_serializer

pytestmark = pytest.mark.usefixtures("shared_runtime")


class Locked:
    def __init__(self, value: int) -> None:
        self.value = value
        self.lock = threading.Lock()


@pytest.fixture
def registered() -> Iterator[None]:
    register_serializer(Locked, serializer=lambda locked: locked.value, deserializer=Locked)
    yield
    deregister_serializer(Locked)


@afield.remote
def value_of(locked: Locked, nested: list[Locked]) -> list[int]:
    assert locked.lock.acquire(blocking=False)
    return [locked.value, *(each.value for each in nested)]


@pytest.mark.usefixtures("registered")
def test_values_travel_as_registered() -> None:
    assert afield.get(afield.put(Locked(1))).value == 1
    assert afield.get(afield.put({"key": [Locked(2)]}))["key"][0].value == 2
    assert afield.get(value_of.remote(Locked(3), [Locked(4)])) == [3, 4]
    captured = Locked(5)
    assert afield.get(afield.remote(lambda: captured.value).remote()) == 5


@pytest.mark.usefixtures("registered")
def test_a_class_derived_from_it_is_not_concerned() -> None:
    class Derived(Locked):
        pass

    with pytest.raises(afield.SerializationError, match="lock"):
        afield.put(Derived(1))


def test_workers_register_for_themselves() -> None:
    @afield.remote
    def make() -> Locked:
        register_serializer(Locked, serializer=lambda locked: locked.value, deserializer=Locked)
        return Locked(6)

    assert afield.get(make.remote()).value == 6


def test_what_is_deregistered_travels_as_before() -> None:
    register_serializer(Locked, serializer=lambda locked: locked.value, deserializer=Locked)
    deregister_serializer(Locked)
    deregister_serializer(Locked)
    with pytest.raises(afield.SerializationError, match="lock"):
        afield.put(Locked(1))


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="takes a class"):
        register_serializer(Locked(1), serializer=str, deserializer=int)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="deserializer=3"):
        register_serializer(Locked, serializer=str, deserializer=3)  # type: ignore[arg-type]


def test_address_is_one_that_workers_reach() -> None:
    with socket.create_server((get_node_ip_address(), 0)) as server:

        @afield.remote
        def connect(port: int) -> str:
            with socket.create_connection((get_node_ip_address(), port), timeout=20):
                return get_node_ip_address()

        assert afield.get(connect.remote(server.getsockname()[1])) == get_node_ip_address()
