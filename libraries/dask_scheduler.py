"""`dask_get`: a scheduler for Dask; each task of a graph becomes an afield task.

Theory of operation. Dask's own conversion turns any graph into nodes that know what they depend on. They are submitted in
Dask's order (which puts what belongs together side by side), each with the refs of its dependencies as arguments; so the
whole graph is with the runtime at once, values in between never come to the driver, and each is freed when the last task
that needs it is done. Data in the graph is put once, however many tasks need it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import afield
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
    refs = _submit(cull(convert_legacy_graph(dsk), wanted), wanted)
    try:
        values = dict(zip(refs, afield.get(list(refs.values())), strict=True))
    except BaseException:
        for ref in refs.values():
            afield.cancel(ref)
        raise
    return _nested(keys, values)


def _submit(graph: dict[Any, Any], wanted: Iterable[Any]) -> dict[Any, Any]:
    """Submit all of the graph; return the refs of the wanted keys."""
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

    refs: dict[Any, Any] = {}
    priorities = order(graph)
    for key in sorted(graph, key=priorities.__getitem__):
        node = graph[key]
        if isinstance(node, Alias):
            refs[key] = refs[node.target]
        elif isinstance(node, DataNode):
            refs[key] = afield.put(node.value)
        else:
            names = list(node.dependencies)
            refs[key] = task(key_split(key)).remote(node, names, *(refs[name] for name in names))
    return {key: refs[key] for key in wanted}


def _run(node: Any, names: list[Any], *values: Any) -> Any:
    return node(dict(zip(names, values, strict=True)))


def _leaves(keys: Any) -> Iterator[Any]:
    if isinstance(keys, list):
        for key in keys:
            yield from _leaves(key)
    else:
        yield keys


def _nested(keys: Any, values: Mapping[Any, Any]) -> Any:
    return tuple(_nested(key, values) for key in keys) if isinstance(keys, list) else values[keys]
