"""`dask_get`: a scheduler for Dask; each task of a graph becomes an afield task.

Theory of operation. Dask's own conversion turns any graph into nodes that know what they depend on. They are submitted in
Dask's order (which puts what belongs together side by side), each with the refs of its dependencies as arguments; so the
whole graph is with the runtime at once, values in between never come to the driver, and each is freed when the last task
that needs it is done. Data in the graph is put once, however many tasks need it. Callbacks, if there are any, are told
about all that (see `dask_callbacks`); the refs of all tasks are kept for them until the end.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import afield
from afield.libraries.dask_callbacks import Around, Hooks
from afield.tracebacks import unseen


@unseen
def dask_get(dsk: Any, keys: Any, **kwargs: Any) -> Any:
    """Compute keys of a Dask graph: ``dask.compute(x, scheduler=afield.dask_get)``.

    Arrays that tasks receive are read-only views of shared memory.

    Args:
        dsk: a graph: a mapping from keys to tasks, or what Dask makes graphs from.
        keys: one key, or a list of keys or of such lists.
        kwargs: what other schedulers of Dask's understand; ignored, as they do.

    Raises:
        ImportError: Dask is not installed, or too old.
        ValueError: the graph depends on a key that it does not have.
        TaskError: a task raised; also an instance of what it raised.
    """
    try:
        from dask._task_spec import convert_legacy_graph, cull
    except ImportError as error:
        raise ImportError("afield.dask_get needs Dask, 2025.1 or newer: pip install 'dask>=2025.1'") from error

    if not isinstance(dsk, Mapping):
        dsk = dsk.__dask_graph__()
    wanted = set(_leaves(keys))
    graph = cull(convert_legacy_graph(dsk), wanted)
    hooks = Hooks.active()
    refs: dict[Any, Any] = {}
    chosen: dict[Any, Any] = {}
    try:
        _submit(graph, wanted, refs, hooks)
        chosen = {key: refs[key] for key in wanted}
        if hooks is None:
            refs.clear()  # values in between are freed as soon as no task needs them
        else:
            hooks.wait(refs, chosen)
        result = _nested(keys, dict(zip(chosen, afield.get(list(chosen.values())), strict=True)))
    except BaseException:
        for ref in (refs or chosen).values():
            afield.cancel(ref)
        if hooks is not None:
            hooks.finish(None, failed=True)
        raise
    if hooks is not None:
        hooks.finish(result, failed=False)
    return result


def _submit(graph: dict[Any, Any], wanted: Iterable[Any], refs: dict[Any, Any], hooks: Hooks | None) -> None:
    """Submit all of the graph, and write the refs of all keys into `refs`."""
    from dask._task_spec import Alias, DataNode
    from dask.order import order
    from dask.utils import key_split

    missing = {key for node in graph.values() for key in node.dependencies} | set(wanted)
    missing.difference_update(graph)
    if missing:
        raise ValueError(f"the graph has no key {missing.pop()!r}, which is wanted or depended on")

    @functools.cache
    def task(name: str) -> Any:
        return afield.remote(_run).options(name=name)

    if hooks is not None:
        hooks.start(graph, [key for key, node in graph.items() if not isinstance(node, Alias | DataNode)])
    priorities = order(graph)
    for key in sorted(graph, key=priorities.__getitem__):
        node = graph[key]
        if isinstance(node, Alias):
            refs[key] = refs[node.target]
        elif isinstance(node, DataNode):
            refs[key] = afield.put(node.value)
        else:
            deps = {name: refs[name] for name in node.dependencies}
            refs[key] = _submit_task(key, node, deps, task(key_split(key)), hooks)


def _submit_task(key: Any, node: Any, deps: dict[Any, Any], task: Any, hooks: Hooks | None) -> Any:
    if hooks is None:
        return task.remote(node, list(deps), None, *deps.values())
    instead = hooks.presubmit(key, deps)
    if instead is not None:
        return afield.put(instead)
    around = hooks.around and (hooks.around, key, list(deps.values()))
    ref = task.remote(node, list(deps), around, *deps.values())
    hooks.postsubmit(key, deps, ref)
    return ref


def _run(node: Any, names: list[Any], around: tuple[Around, Any, list[Any]] | None, *values: Any) -> Any:
    arguments = dict(zip(names, values, strict=True))
    if around is None:
        return node(arguments)
    callbacks, key, refs = around
    return callbacks.call(key, refs, lambda: node(arguments))


def enable_dask(**_: Any) -> Any:
    """Make `dask_get` the scheduler of all computations from here on, or of those in the ``with`` block."""
    import dask

    return dask.config.set(scheduler=dask_get)


def disable_dask() -> Any:
    """Let Dask choose its scheduler again."""
    import dask

    return dask.config.set(scheduler=None)


def _leaves(keys: Any) -> Iterator[Any]:
    if isinstance(keys, list):
        for key in keys:
            yield from _leaves(key)
    else:
        yield keys


def _nested(keys: Any, values: Mapping[Any, Any]) -> Any:
    return tuple(_nested(key, values) for key in keys) if isinstance(keys, list) else values[keys]
