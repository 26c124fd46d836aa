"""Who is told what during a computation of `dask_get`: Dask's own callbacks, and those that Ray's scheduler for Dask has.

Theory of operation. A computation asks once, at its beginning, who listens (`Hooks.active`); without anybody it does nothing
of what stands here. Dask's callbacks (`dask.callbacks.Callback`, and with it `dask.diagnostics.ProgressBar`) are called in
the driver: `pretask` when a task is submitted, `posttask` when it is done. Values in between never come to the driver, so
their `posttask` gets None. Of the callbacks of a `RayDaskCallback`, `pretask` and `posttask` travel with each task and
are called around it in its worker; the others are called in the driver.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import afield

_DRIVER = ("presubmit", "postsubmit", "postsubmit_all", "finish")
_DASK = ("start", "start_state", "pretask", "posttask", "finish")


class RayDaskCallback:
    """Callbacks of a computation, under Ray's names; a context manager.

    Override any of `_ray_presubmit(task, key, deps)` (what it returns, if not None, is the task's result),
    `_ray_postsubmit(task, key, deps, object_ref)`, `_ray_pretask(key, object_refs)`,
    `_ray_posttask(key, result, pre_state)`, `_ray_postsubmit_all(object_refs, dsk)` and `_ray_finish(result)`, or of
    Dask's own (`_start`, `_start_state`, `_pretask`, `_posttask`, `_finish`); or pass functions without the first
    underscore: ``RayDaskCallback(ray_finish=print)``.
    """

    #: Those that are registered, the oldest first.
    ray_active: ClassVar[dict[RayDaskCallback, None]] = {}

    def __init__(self, **callbacks: Callable[..., Any]) -> None:
        known = {f"ray_{name}" for name in (*_DRIVER, "pretask", "posttask")} | set(_DASK)
        for name, function in callbacks.items():
            if name not in known:
                raise TypeError(f"there is no callback {name!r}; there are {', '.join(sorted(known))}")
            setattr(self, f"_{name}", function)

    def register(self) -> None:
        """Take part in all computations from now on."""
        RayDaskCallback.ray_active[self] = None

    def unregister(self) -> None:
        """Take part in no more computations."""
        RayDaskCallback.ray_active.pop(self, None)

    def __enter__(self) -> RayDaskCallback:
        self.register()
        return self

    def __exit__(self, *_: object) -> None:
        self.unregister()


class ProgressBarCallback:
    """Ray's name for a bar on the terminal: the same as `dask.diagnostics.ProgressBar`."""

    def __init__(self) -> None:
        from dask.diagnostics.progress import ProgressBar

        make: Callable[[], Any] = ProgressBar  # it has no types
        self._bar = make()

    def __enter__(self) -> ProgressBarCallback:
        self._bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.__exit__(*error)


class Around:
    """The callbacks that are called around each task, where it runs."""

    def __init__(self, pairs: list[tuple[Callable[..., Any] | None, Callable[..., Any] | None]]) -> None:
        self._pairs = pairs  # of each RayDaskCallback: pretask, posttask

    def call(self, key: Any, refs: list[Any], run: Callable[[], Any]) -> Any:
        """Run a task between the callbacks; each `posttask` gets what its `pretask` returned."""
        states = [pre(key, refs) if pre is not None else None for pre, _ in self._pairs]
        result = run()
        for (_, post), state in zip(self._pairs, states, strict=True):
            if post is not None:
                post(key, result, state)
        return result


class Hooks:
    """All who listen to one computation."""

    @staticmethod
    def active() -> Hooks | None:
        """Return them, or None if nobody listens."""
        from dask.callbacks import Callback

        rays = list(RayDaskCallback.ray_active)
        dasks = [dict(zip(_DASK, each, strict=True)) for each in Callback.active]
        dasks += [found for ray in rays if any((found := {n: getattr(ray, f"_{n}", None) for n in _DASK}).values())]
        return Hooks(rays, dasks) if rays or dasks else None

    def __init__(self, rays: list[RayDaskCallback], dasks: list[dict[str, Any]]) -> None:
        self._dasks = dasks
        self._rays = {name: [f for ray in rays if (f := getattr(ray, f"_ray_{name}", None))] for name in _DRIVER}
        pairs = [(getattr(ray, "_ray_pretask", None), getattr(ray, "_ray_posttask", None)) for ray in rays]
        pairs = [pair for pair in pairs if any(pair)]
        self.around = Around(pairs) if pairs else None
        self._graph: Any = None
        #: As Dask's own schedulers have it, as far as callbacks look at it.
        self._state: dict[str, Any] = {"waiting": {}, "ready": [], "running": set(), "finished": set(), "cache": {}}

    def start(self, graph: Mapping[Any, Any], tasks: list[Any]) -> None:
        """The computation begins; `tasks` are the keys that will run."""
        self._graph = graph
        self._tell("start", graph)
        self._state["waiting"] = {key: set(graph[key].dependencies) for key in tasks}
        self._tell("start_state", graph, self._state)

    def presubmit(self, key: Any, deps: dict[Any, Any]) -> Any:
        """Return what stands for the task's result, or None if the task is to run."""
        for callback in self._rays["presubmit"]:
            result = callback(self._graph[key], key, deps)
            if result is not None:
                self._submitted(key)
                return result
        return None

    def postsubmit(self, key: Any, deps: dict[Any, Any], ref: Any) -> None:
        """The task is with the runtime."""
        self._submitted(key)
        for callback in self._rays["postsubmit"]:
            callback(self._graph[key], key, deps, ref)

    def _submitted(self, key: Any) -> None:
        self._state["waiting"].pop(key, None)
        self._state["running"].add(key)
        self._tell("pretask", key, self._graph, self._state)

    def wait(self, refs: dict[Any, Any], wanted: dict[Any, Any]) -> None:
        """All tasks are submitted: tell of each as it ends, until the wanted ones have, or one of those failed."""
        for callback in self._rays["postsubmit_all"]:
            callback(list(wanted.values()), self._graph)
        if not self._dasks:
            return
        keys: dict[Any, list[Any]] = {}
        for key in self._state["running"]:
            keys.setdefault(refs[key], []).append(key)
        pending = list(keys)
        while pending:
            ready, pending = afield.wait(pending)
            for key in (key for ref in ready for key in keys[ref]):
                self._state["running"].discard(key)
                self._state["finished"].add(key)
                value = afield.get(refs[key]) if key in wanted else None
                self._tell("posttask", key, value, self._graph, self._state, "afield")

    def finish(self, result: Any, failed: bool) -> None:
        """The computation is over."""
        if not failed:
            for callback in self._rays["finish"]:
                callback(result)
        self._tell("finish", self._graph, self._state, failed)

    def _tell(self, name: str, *args: Any) -> None:
        for callbacks in self._dasks:
            if callbacks[name] is not None:
                callbacks[name](*args)
