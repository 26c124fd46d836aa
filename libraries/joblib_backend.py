"""`register_joblib`: joblib's `Parallel`, and with it scikit-learn's `n_jobs`, on afield.

Theory of operation. A batch of calls, as joblib cuts them, becomes one call of an `Executor` that is as wide as `n_jobs`;
joblib submits the next from the callback of the last. Calls of one `Parallel` often share large arrays, such as the data
that every fit of a search needs. The pickler takes those out of the batch and puts each only once, for as long as it
exists; workers get read-only views of the same shared memory.

joblib is imported when `register_joblib` is called, so the backend's class is made there too.
"""

from __future__ import annotations

import io
import pickle
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from types import CodeType
from typing import Any

import cloudpickle
import numpy as np

import afield
from afield.code_names import reduce_code
from afield.libraries.executor import Executor

#: Arrays from this size on are shared between batches; smaller ones are cheaper to send along.
SHARED_BYTES = 1 << 20

_NEEDS_JOBLIB = "register_joblib() needs joblib, 1.5 or newer: pip install 'joblib>=1.5'"


def register_joblib() -> None:
    """Make the backend "afield" known to joblib: ``with joblib.parallel_config("afield"): ...``.

    Keyword arguments of `parallel_config` are options of the tasks, such as `num_gpus=0.5`; so is what a dict
    `ray_remote_args` has. The backend has the name "ray" as well, for programs that were written for it.

    Raises:
        ImportError: joblib is not installed, or too old.
    """
    try:
        import joblib
        from joblib.parallel import ParallelBackendBase
    except ImportError as error:
        raise ImportError(_NEEDS_JOBLIB) from error
    if not hasattr(ParallelBackendBase, "submit"):
        raise ImportError(f"{_NEEDS_JOBLIB} (this is joblib {joblib.__version__})")
    backend = _backend_class()
    for name in ("afield", "ray"):
        joblib.register_parallel_backend(name, backend)


def _backend_class() -> Any:
    from joblib.parallel import AutoBatchingMixin, ParallelBackendBase

    class AfieldBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]  # joblib has no types
        supports_retrieve_callback = True

        def effective_n_jobs(self, n_jobs: int | None) -> int:
            if n_jobs == 0:
                raise ValueError("n_jobs == 0 in Parallel has no meaning")
            if n_jobs is None:
                return 1
            cpus = int(afield.cluster_resources().get("CPU", 1)) if n_jobs < 0 else 0
            return n_jobs if n_jobs > 0 else max(cpus + 1 + n_jobs, 1)

        def configure(self, n_jobs: int = 1, parallel: Any = None, **memmapping: Any) -> int:
            self.parallel = parallel  # `memmapping` is about a temporary folder, which we have no use for
            self._open(self.effective_n_jobs(n_jobs))
            return self._width

        def _open(self, width: int) -> None:
            self._width = width
            options = dict(self.backend_kwargs)
            options |= options.pop("ray_remote_args", None) or {}
            self._executor = Executor(width, **options)
            self._shared = SharedArrays()

        def submit(self, func: Callable[[], Any], callback: Any = None) -> Future[Any]:
            data, refs = self._shared.dumps(func)
            future = self._executor.submit(_run_batch, data, *refs)
            if callback is not None:
                future.add_done_callback(callback)
            return future

        def retrieve_result_callback(self, out: Future[Any]) -> Any:
            return out.result()

        def abort_everything(self, ensure_ready: bool = True) -> None:
            self._executor.shutdown(wait=False, cancel_futures=True)
            if ensure_ready:
                self._open(self._width)

        def terminate(self) -> None:
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._shared = SharedArrays()
            self.reset_batch_stats()

    return AfieldBackend


class SharedArrays:
    """Pickles values with their large arrays as refs. Safe in all threads."""

    def __init__(self) -> None:
        #: id -> the array, and the ref of its value. An id may be used again once its array is gone.
        self._refs: dict[int, tuple[weakref.ref[Any], Any]] = {}

    def dumps(self, value: Any) -> tuple[bytes, list[Any]]:
        """Return the pickled value and the refs of the arrays that are missing in it."""
        file = io.BytesIO()
        pickler = _Pickler(file, self._ref_of)
        pickler.dump(value)
        return file.getvalue(), pickler.refs

    def _ref_of(self, array: Any) -> Any:
        known = self._refs.get(id(array))
        if known is not None and known[0]() is array:
            return known[1]
        refs, key, ref = self._refs, id(array), afield.put(array)
        refs[key] = weakref.ref(array, lambda _: refs.pop(key, None)), ref
        return ref


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle has no types
    def __init__(self, file: io.BytesIO, ref_of: Callable[[Any], Any]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._ref_of = ref_of
        self.refs: list[Any] = []

    def persistent_id(self, obj: Any) -> int | None:
        if type(obj) is not np.ndarray or obj.nbytes < SHARED_BYTES or obj.dtype.hasobject:
            return None
        self.refs.append(self._ref_of(obj))
        return len(self.refs) - 1

    def reducer_override(self, obj: Any) -> Any:
        return reduce_code(self, obj) if type(obj) is CodeType else super().reducer_override(obj)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, arrays: tuple[Any, ...]) -> None:
        super().__init__(file)
        self._arrays = arrays

    def persistent_load(self, pid: int) -> Any:
        return self._arrays[pid]


def _run_batch(data: bytes, *arrays: Any) -> Any:
    return _Unpickler(io.BytesIO(data), arrays).load()()
