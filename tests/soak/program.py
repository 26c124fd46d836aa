"""What one thread of a soak's driver does: it makes, passes on, reads and drops futures whose values the model knows.

Theory of operation. A thread has a pool of `Known` futures: a ref and the specification of its value. Each step does one thing
that a user's program does, chosen by the thread's own random numbers. Whatever is read is compared with the model. An error
is fine only if it is one of those that the faults of this run may cause; a wait that takes longer than `PATIENCE_S` is a hang.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import afield
from afield.errors import AfieldError, CapacityError, GetTimeoutError, LossError, SchedulingError, TaskError
from tests.soak.values import OPERATIONS, Leaf, Spec, Step, apply, differs, make, model, random_leaf, to_host

PATIENCE_S = 90.0
#: Futures that a thread keeps, and the depth of what they were made from.
POOL, DEPTH = 14, 4


class WrongValueError(AssertionError):
    """A value is not what the model says."""


@dataclass
class Known:
    """A future of the value that `spec` describes; `depth` counts the steps behind it."""

    ref: Any
    spec: Spec
    depth: int = 0


def _task(name: str, *arguments: Any) -> Any:
    return apply(name, list(arguments), afield.array_module)


def _make(leaf: Leaf) -> Any:
    import numpy as np

    return make(leaf, afield.array_module() if leaf.on_device else np)


def _two(*arguments: Any) -> Any:
    return apply("more", list(arguments), afield.array_module), apply("copy", list(arguments), afield.array_module)


def _items(count: int, argument: Any) -> Any:
    for index in range(count):
        yield apply(OPERATIONS[index % 3], [argument], afield.array_module)


class Keeper:
    """An actor that keeps one value and gives back the one before."""

    def __init__(self, first: Any) -> None:
        self.kept = first

    def swap(self, value: Any) -> Any:
        before, self.kept = self.kept, value
        return before


class Remotes:
    """The remote functions of a soak, made once for each session."""

    def __init__(self, devices: int) -> None:
        self.devices = devices
        on_device: dict[str, Any] = {"num_gpus": 0.25, "num_cpus": 0.5}
        self.tasks = [afield.remote(num_cpus=0.5)(_task)]
        self.makes = [afield.remote(num_cpus=0.5)(_make)]
        self.twos = [afield.remote(num_cpus=0.5, num_returns=2)(_two)]
        self.items = [afield.remote(num_cpus=0.5)(_items)]
        self.keepers = [afield.remote(Keeper)]
        if devices:
            self.tasks.append(afield.remote(**on_device)(_task))
            self.makes.append(afield.remote(**on_device)(_make))
            self.twos.append(afield.remote(num_returns=2, **on_device)(_two))
            self.items.append(afield.remote(**on_device)(_items))
            self.keepers.append(afield.remote(num_gpus=0.125)(Keeper))


class Program:
    """One thread's random program.

    Args:
        seed: of its random numbers.
        remotes: what it calls.
        faulty: whether losses and full stores are to be expected.
    """

    def __init__(self, seed: str, remotes: Remotes, *, faulty: bool) -> None:
        self.rng = random.Random(seed)
        self.remotes = remotes
        self.faulty = faulty
        self.pool: list[Known] = []
        self.actor: tuple[Any, Spec] | None = None
        self.counts: Counter[str] = Counter()

    def step(self) -> None:
        """Do one thing; raises what it must not raise."""
        actions: list[tuple[int, Callable[[], None]]] = [
            (5, self.put),
            (3, self.make_by_task),
            (8, self.call),
            (2, self.call_two),
            (2, self.generate),
            (3, self.use_actor),
            (9, self.read),
            (2, self.read_many),
            (1, self.nest),
            (2, self.drop),
        ]
        action = self.rng.choices([one for _, one in actions], [weight for weight, _ in actions])[0]
        self.counts[action.__name__] += 1
        try:
            action()
        except WrongValueError:
            raise
        except AfieldError as error:
            if isinstance(error, GetTimeoutError) or not self._may_be(error):
                raise
            self.counts[f"! {type(error).__name__}"] += 1
        while len(self.pool) > POOL:
            del self.pool[self.rng.randrange(len(self.pool))]

    def _may_be(self, error: BaseException | None) -> bool:
        """Tell whether an error, or what a task that raised had met itself, is one that faults cause."""
        if isinstance(error, TaskError):
            cause = error.cause
            return isinstance(cause, AfieldError) and self._may_be(cause)
        return self.faulty and isinstance(error, LossError | CapacityError | SchedulingError)

    # -- making ----------------------------------------------------------------------------------------------------

    def put(self) -> None:
        leaf = random_leaf(self.rng, devices=bool(self.remotes.devices))
        self.pool.append(Known(afield.put(_make(leaf)), leaf))

    def make_by_task(self) -> None:
        make_remote = self.rng.choice(self.remotes.makes)
        leaf = random_leaf(self.rng, devices=make_remote is not self.remotes.makes[0])
        self.pool.append(Known(make_remote.remote(leaf), leaf))

    def _some(self, most: int = 1) -> list[Known]:
        shallow = [known for known in self.pool if known.depth < DEPTH]
        return self.rng.sample(shallow, min(len(shallow), self.rng.randint(1, most)))

    def call(self) -> None:
        arguments = self._some(3)
        if not arguments:
            return
        name = self.rng.choice(OPERATIONS)
        ref = self.rng.choice(self.remotes.tasks).remote(name, *[known.ref for known in arguments])
        spec = Step(name, tuple(known.spec for known in arguments))
        self.pool.append(Known(ref, spec, 1 + max(known.depth for known in arguments)))

    def call_two(self) -> None:
        for known in self._some():
            more, copy = self.rng.choice(self.remotes.twos).remote(known.ref)
            self.pool.append(Known(more, Step("more", (known.spec,)), known.depth + 1))
            self.pool.append(Known(copy, Step("copy", (known.spec,)), known.depth + 1))

    def generate(self) -> None:
        for known in self._some():
            count = self.rng.randint(0, 5)
            taken = self.rng.randint(0, count)
            items = self.rng.choice(self.remotes.items).remote(count, known.ref)
            for index in range(taken):
                ref = self._next(items)
                if ref is None:
                    assert self.faulty, "a generator ended before its task"
                    return  # what ended it is the item before
                self.pool.append(Known(ref, Step(OPERATIONS[index % 3], (known.spec,)), known.depth + 1))
            if taken == count:
                more = self._next(items)
                if more is not None:
                    value = afield.get(more, timeout=PATIENCE_S)  # raises what has ended the task
                    raise AssertionError(f"a generator yielded more than its task: {value!r}")

    def _next(self, items: Any) -> Any:
        ready, _ = afield.wait([items], timeout=PATIENCE_S)
        assert ready, "an item of a generator took too long"
        return next(items, None)

    def use_actor(self) -> None:
        chosen = self._some()
        if not chosen:
            return
        known = chosen[0]
        if self.actor is None or self.rng.random() < 0.1:
            self.actor = self.rng.choice(self.remotes.keepers).remote(known.ref), known.spec
            return
        actor, before = self.actor
        self.actor = None  # should the call be lost, nobody knows what it keeps
        ref = actor.swap.remote(known.ref)
        self._compare(afield.get(ref, timeout=PATIENCE_S), before)
        self.actor = actor, known.spec

    def nest(self) -> None:
        for known in self._some():
            outer = afield.put([known.ref, 7])
            inner, seven = afield.get(outer, timeout=PATIENCE_S)
            assert seven == 7
            del outer
            self._compare(afield.get(inner, timeout=PATIENCE_S), known.spec)

    # -- reading ---------------------------------------------------------------------------------------------------

    def read(self) -> None:
        if not self.pool:
            return
        at = self.rng.randrange(len(self.pool))
        known = self.pool.pop(at)  # an error takes it out of the pool
        where: Any = self.rng.choice([None, None, "host", *range(self.remotes.devices)])
        self._compare(afield.get(known.ref, timeout=PATIENCE_S, device=where), known.spec)
        if self.rng.random() < 0.6:
            self.pool.insert(at, known)

    def read_many(self) -> None:
        chosen = self.rng.sample(self.pool, min(len(self.pool), 4))
        _, rest = afield.wait([known.ref for known in chosen], num_returns=len(chosen), timeout=PATIENCE_S)
        assert not rest, "a wait took too long"
        for known in chosen:
            self.pool.remove(known)
        values = afield.get([known.ref for known in chosen], timeout=PATIENCE_S)
        for value, known in zip(values, chosen, strict=True):
            self._compare(value, known.spec)
        self.pool += chosen

    def drop(self) -> None:
        del self.pool[self.rng.randrange(len(self.pool) + 1) :]

    def _compare(self, value: Any, spec: Spec) -> None:
        self.counts["compared"] += 1
        problem = differs(to_host(value), model(spec))
        if problem:
            raise WrongValueError(f"{problem}; it is {spec}")
