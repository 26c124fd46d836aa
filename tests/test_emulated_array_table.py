"""The emulated device array computes what NumPy computes, and what CuPy computes where there is a GPU.

One table of expressions and statements runs on NumPy and on a device array module; values, dtypes and shapes must agree.
The module is the emulated one and, under the marker `gpu`, CuPy itself, so that the table says nothing that CuPy does not do.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from afield.gpu_store.emulated_arrays import make_module
from afield.scheduler.devices import parse_devices

# ---- the table ----------------------------------------------------------------------------------------------------------


def operands(xp: Any) -> SimpleNamespace:
    """What the expressions are made of: the same values as arrays of any module."""
    draw = np.random.default_rng(7)
    hosts = {
        "x": draw.normal(size=(3, 4)),
        "y": draw.normal(size=(3, 4)),
        "f": draw.normal(size=(3, 4)).astype(np.float32),
        "v": draw.normal(size=4),
        "p": draw.uniform(0.1, 0.9, size=(2, 3)),
        "s": draw.normal(size=(3, 3)) + 4 * np.eye(3),
        "sym": np.array([[2.0, 0.5], [0.5, 1.0]]),
        "i": np.arange(12).reshape(3, 4),
        "k": np.array([3, 1, 2, 1, 0]),
        "u": np.array([1, 2, 255], np.uint8),
        "h": np.array([0.5, 1.5], np.float16),
        "b": np.array([[True, False, True, True], [False, False, True, False], [True, True, True, True]]),
        "c": draw.normal(size=3) + 1j * draw.normal(size=3),
        "n": np.array([1.0, np.nan, 3.0]),
        "t": draw.normal(size=(2, 3, 4)),
        "z": np.zeros((0, 4)),
        "o": np.array(2.5),
    }
    return SimpleNamespace(**{name: xp.asarray(host) for name, host in hosts.items()})


ARITHMETIC = """
    a.x + a.y | a.x - 1 | 2 * a.x | a.x / a.y | a.i // 5 | a.i % 3 | -a.x | +a.x | abs(a.x) | a.x ** 2 | 2 ** a.i | ~a.b
    a.i & 3 | a.i | a.i ^ 6 | a.i << 1 | a.i >> 1 | a.b & a.b | a.x < a.y | a.x >= 0 | a.x == a.x | a.x != a.y
    divmod(a.i, 5) | a.x + a.v | a.x[:, None, :] * a.v | a.f + 1 | a.f + 1.5 | a.f + a.x | a.f * np.float64(2) | a.u + 1
    a.u + a.i[0, :3] | a.h * 2 | a.h + a.f[0, :2] | a.b + 1 | a.b + a.b | a.i / 2 | a.i * 1.5 | a.c * a.c | a.c + 1
    a.x * 1j | np.float32(3) * a.f | a.i * np.int8(2) | True + a.i | a.x @ a.x.T | a.x @ a.v | a.v @ a.v
    a.t @ a.t.transpose(0, 2, 1) | a.o + 1 | a.o * a.x | a.z + 1 | a.x.T + a.y.T | a.n == a.n | a.u - a.u[::-1]
    1 / a.v | 3 - a.f | 7 // a.k[:3] | 5 % (a.i + 1) | 2.0 ** a.f
"""
UFUNCS = """
    xp.exp(a.x) | xp.log(a.p) | xp.sqrt(a.p) | xp.sin(a.x) | xp.arctan2(a.x, a.y) | xp.tanh(a.f) | xp.maximum(a.x, a.y)
    xp.minimum(a.x, 0) | xp.fmax(a.n, 0) | xp.sign(a.x) | xp.floor(a.x) | xp.ceil(a.f) | xp.rint(a.x) | xp.trunc(a.x)
    xp.isnan(a.n) | xp.isfinite(a.n) | xp.logical_and(a.b, a.b) | xp.logical_not(a.i) | xp.square(a.i)
    xp.reciprocal(a.x) | xp.exp(a.i) | xp.exp(a.h) | xp.exp(a.c) | xp.absolute(a.c) | xp.conj(a.c) | xp.modf(a.x)
    xp.frexp(a.x) | xp.hypot(a.x, a.y) | xp.power(a.p, 3) | xp.logaddexp(a.x, a.y) | xp.expm1(a.x) | xp.log1p(a.p)
    xp.cbrt(a.x) | xp.copysign(a.x, a.y) | xp.greater(a.x, a.y) | xp.equal(a.i, 3) | xp.add(a.x, a.y)
    xp.multiply(a.f, 2) | xp.true_divide(a.i, 4) | xp.gcd(a.i, 6) | xp.left_shift(a.i, 2) | xp.invert(a.i)
    xp.degrees(a.x) | xp.arcsinh(a.x) | xp.exp(2.0) | xp.add(1, 2) | xp.matmul(a.x, a.x.T) | xp.exp(a.z) | xp.exp(a.o)
    np.exp(a.x) | np.add(a.x, 1) | np.multiply(2, a.f) | xp.log(a.n) | xp.sqrt(a.f) | xp.cosh(a.h)
"""
REDUCTIONS = """
    a.x.sum() | a.x.sum(axis=0) | a.x.sum(axis=(0, 1), keepdims=True) | a.f.sum() | a.i.sum() | a.u.sum() | a.b.sum()
    a.x.mean() | a.f.mean(axis=1) | a.i.mean() | a.x.std() | a.x.var(ddof=1, axis=0) | a.x.min() | a.x.max(axis=1)
    a.i.prod() | a.b.any() | a.b.all(axis=1) | a.x.argmax() | a.x.argmin(axis=0) | a.x.cumsum() | a.x.cumprod(axis=1)
    a.s.trace() | xp.sum(a.x, axis=1) | xp.mean(a.x) | xp.amax(a.x, axis=0) | xp.median(a.x)
    xp.average(a.x, weights=a.v, axis=1) | xp.nansum(a.n) | xp.nanmean(a.n) | xp.nanmax(a.n) | xp.percentile(a.x, 30)
    xp.percentile(a.x, [25, 75]) | xp.quantile(a.x, 0.5, axis=1) | xp.ptp(a.x, axis=0) | xp.count_nonzero(a.i)
    xp.count_nonzero(a.b, axis=0) | xp.cov(a.x) | xp.corrcoef(a.x) | xp.bincount(a.k) | xp.all(a.b)
    xp.allclose(a.x, a.x) | xp.array_equal(a.x, a.y) | xp.isclose(a.x, a.y) | xp.std(a.f) | xp.cumsum(a.i, axis=0)
    xp.diff(a.x) | xp.argmax(a.x, axis=1) | xp.prod(a.p, axis=0) | np.sum(a.x) | np.mean(a.x, axis=0) | a.z.sum(axis=0)
    a.o.sum() | xp.any(a.b, axis=1) | xp.histogram(a.v, bins=3, range=(-2.0, 2.0)) | xp.nanstd(a.n) | a.c.sum()
    xp.cumprod(a.p) | xp.gradient(a.v) | xp.nanargmax(a.n)
"""
SHAPES = """
    a.x.T | a.x.reshape(4, 3) | a.x.reshape((2, -1)) | a.x.reshape(4, 3, order="F") | a.x.ravel() | a.x.flatten("F")
    a.t.transpose(2, 0, 1) | a.t.swapaxes(0, 2) | a.x[None].squeeze() | a.x.astype("f4") | a.f.astype(int)
    a.x.astype(bool) | a.i.astype(complex) | a.x.copy() | a.x.repeat(2, axis=1) | a.x.diagonal() | a.x.real | a.c.imag
    a.x.clip(-1, 0.5) | a.x.round(1) | a.v.take([0, 2]) | a.f.view("i4") | xp.concatenate([a.x, a.y])
    xp.concatenate((a.x, a.f), axis=1) | xp.stack([a.x, a.y], axis=2) | xp.vstack([a.x, a.v]) | xp.hstack([a.x, a.y])
    xp.dstack([a.x, a.y]) | xp.column_stack([a.v, a.v]) | xp.split(a.x, 2, axis=1) | xp.array_split(a.v, [1, 3])
    xp.tile(a.v, (2, 2)) | xp.broadcast_to(a.v, (2, 4)) | xp.broadcast_arrays(a.x, a.v) | xp.expand_dims(a.x, 1)
    xp.moveaxis(a.t, 0, 2) | xp.roll(a.x, 1, axis=1) | xp.roll(a.x, (1, 2), axis=(0, 1)) | xp.flip(a.x, 0)
    xp.rot90(a.x) | xp.pad(a.x, ((1, 0), (0, 2))) | xp.pad(a.v, 2, mode="edge") | xp.ravel(a.x)
    xp.reshape(a.x, (6, 2)) | xp.transpose(a.t, (1, 0, 2)) | xp.atleast_2d(a.v) | xp.squeeze(a.x[None])
    xp.append(a.v, a.v) | xp.delete(a.v, 1) | xp.where(a.b, a.x, a.y) | xp.where(a.b) | xp.where(a.x > 0, a.x, 0)
    xp.nonzero(a.b) | xp.argwhere(a.b) | xp.unique(a.k) | xp.unique(a.k, return_counts=True) | xp.sort(a.x, axis=0)
    xp.argsort(a.v) | xp.searchsorted(xp.sort(a.v), a.v) | xp.partition(a.v, 1)[1] | xp.flatnonzero(a.b)
    xp.take_along_axis(a.x, xp.argsort(a.x, axis=1), axis=1) | xp.meshgrid(a.v, a.k)[0] | xp.triu(a.s)
    xp.tril(a.s, -1) | xp.diag(a.v) | xp.diag(a.s) | xp.isin(a.k, a.k[:2]) | xp.digitize(a.v, xp.sort(a.p[0]))
    xp.interp(a.v, xp.arange(3.0), a.p[0]) | xp.nan_to_num(a.n) | xp.clip(a.x, -0.5, 0.5)
    xp.select([a.x > 1, a.x < 0], [a.x, a.y], 0) | xp.unravel_index(a.k, (2, 3)) | xp.compress(a.b[0], a.x, axis=1)
    xp.round(a.x, 2) | xp.kron(a.v, a.v) | xp.outer(a.v, a.v) | xp.lexsort(xp.stack([a.v, a.v])) | xp.packbits(a.b)
    xp.swapaxes(a.t, 0, 1) | xp.apply_along_axis(lambda r: r * r.max(), 1, a.x)
    xp.piecewise(a.v, [a.v < 0, a.v >= 0], [-1, 1])
"""
INDEXING = """
    a.x[0] | a.x[0, 1] | a.x[-1, ::-1] | a.x[:, 1:3] | a.x[..., 0] | a.x[None, 0] | a.x[a.x > 0] | a.x[a.b]
    a.x[a.k[:3] % 3] | a.x[[0, 2]] | a.x[[0, 2], [1, 3]] | a.x[np.array([1, 0])] | a.x[a.b[:, 0]] | a.x[1:, a.k[:2]]
    a.o[()] | a.o[None] | a.v[::2] | a.t[1, :, ::2] | a.z[:0] | a.x[a.k[0] % 3] | a.x[:, [True, False, True, True]]
    a.x[a.k[1]:, 0] | a.t[:, a.k[:2] % 3, 1] | list(a.k)[1] | a.x[()] | a.x[..., None]
"""
CREATION = """
    xp.zeros((2, 3)) | xp.zeros(3, dtype="i4") | xp.ones((2,), xp.float32) | xp.full((2, 2), 7)
    xp.full(3, 1.5, dtype="f4") | xp.eye(3) | xp.arange(5) | xp.arange(1, 2, 0.25) | xp.arange(3, dtype=xp.float32)
    xp.linspace(0, 1, 5) | xp.logspace(0, 2, 3) | xp.identity(2) | xp.zeros_like(a.f) | xp.ones_like(a.x, dtype=int)
    xp.full_like(a.i, 3) | xp.empty_like(a.x).shape | xp.array([1, 2, 3]) | xp.tri(3)
    xp.array([[1.5, 2], [3, 4]], dtype="f4") | xp.array(a.x) | xp.array([a.v, a.v]) | xp.asarray(a.x, dtype="f4")
    xp.asarray(3) | xp.array(2.5) | xp.array([1, 2], ndmin=2) | xp.ascontiguousarray(a.x.T) | xp.asfortranarray(a.x)
    xp.indices((2, 3)) | xp.hanning(5) | xp.mgrid[0:2, 0:3] | xp.tril_indices(3) | xp.frombuffer(b"abcd", dtype="u1")
    xp.copy(a.x) | xp.array([]) | xp.array([True, False]) | xp.fft.fftfreq(4)
"""
ALGEBRA = """
    xp.dot(a.x, a.v) | a.x.dot(a.v) | xp.inner(a.v, a.v) | xp.vdot(a.v, a.v) | xp.tensordot(a.t, a.x, axes=([2], [1]))
    xp.einsum("ij,kj->ik", a.x, a.y) | xp.einsum("ii", a.s) | xp.cross(a.s, a.s[::-1]) | xp.linalg.norm(a.x)
    xp.linalg.norm(a.x, axis=1) | xp.linalg.inv(a.s) | xp.linalg.det(a.s) | xp.linalg.solve(a.s, a.s[0])
    abs(xp.linalg.qr(a.s)[1]) | xp.linalg.svd(a.s)[1] | xp.linalg.eigh(a.sym)[0] | xp.linalg.cholesky(a.sym)
    xp.trace(a.s) | xp.linalg.pinv(a.x) | xp.linalg.matrix_rank(a.s) | xp.linalg.lstsq(a.s, a.s[0], rcond=None)[0]
    xp.linalg.matrix_power(a.s, 3) | xp.linalg.slogdet(a.s) | xp.fft.fft(a.v) | xp.fft.rfft(a.f) | xp.fft.ifft2(a.x)
    xp.fft.fftshift(a.v) | xp.convolve(a.v, a.p[0]) | xp.polyval(a.v, a.p) | xp.fft.irfft(xp.fft.rfft(a.v))
"""
QUESTIONS = """
    a.x.shape | a.x.ndim | a.x.size | a.x.dtype | a.x.itemsize | a.x.nbytes | a.x.T.strides | len(a.x) | float(a.o)
    int(a.k[0]) | bool(a.b[0, 0]) | a.o.item() | a.x.tolist() | a.x.flags.c_contiguous | a.x.T.flags["F_CONTIGUOUS"]
    xp.result_type(a.f, a.x) | xp.can_cast("f4", "f8") | a.x.tobytes() | xp.ndim(a.x) | xp.size(a.x) | xp.shape(a.x)
    xp.iscomplexobj(a.c) | xp.isscalar(3) | xp.float32 | xp.pi | xp.finfo("f4").eps | range(9)[a.k[0]]
    xp.promote_types("i4", "f4") | xp.shares_memory(a.x, a.x.T) | (a.x + 1).T.flags.f_contiguous
    (a.x.T + 1).flags.f_contiguous | repr(a.k) | f"{a.o:.2f}" | xp.issubdtype(a.f.dtype, xp.floating)
    xp.broadcast_shapes((2, 1), (3,)) | complex(a.c[0]) | a.x.astype("f4", order="F").strides
"""
TABLE = [
    expression.strip()
    for text in (ARITHMETIC, UFUNCS, REDUCTIONS, SHAPES, INDEXING, CREATION, ALGEBRA, QUESTIONS)
    for line in text.strip().splitlines()
    for expression in line.split(" | ")
]


def host_value(value: Any, xp: Any) -> Any:
    """A result with NumPy arrays in place of device arrays; NumPy arrays must not be among those of a device."""
    if isinstance(value, tuple | list):
        return [host_value(item, xp) for item in value]
    if isinstance(value, xp.ndarray):
        return xp.asnumpy(value) if xp is not np else value
    if xp is not np:
        assert not isinstance(value, np.ndarray | np.generic), f"{value!r} came back to the host"
    return np.asarray(value) if isinstance(value, np.generic) else value


def assert_same(actual: Any, expected: Any) -> None:
    if isinstance(expected, list):
        assert isinstance(actual, list) and len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)
    elif isinstance(actual, np.ndarray) or isinstance(expected, np.ndarray):
        expected = np.asarray(expected)
        assert actual.dtype == expected.dtype
        assert actual.shape == expected.shape
        np.testing.assert_allclose(actual, expected, rtol=1e-4 if actual.dtype.itemsize < 8 else 1e-10, atol=1e-12)
    else:
        assert actual == expected


@pytest.fixture(params=["emulated", pytest.param("cupy", marks=pytest.mark.gpu)], scope="module")
def device_module(request: pytest.FixtureRequest) -> Any:
    return (
        make_module(parse_devices("emulated:1:64MiB")) if request.param == "emulated" else pytest.importorskip("cupy")
    )


@pytest.mark.contract("numpy")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("expression", TABLE)
def test_computes_what_numpy_computes(expression: str, device_module: Any) -> None:
    code = compile(expression, "<table>", "eval")
    expected = eval(code, {"xp": np, "np": np, "a": operands(np)})
    actual = eval(code, {"xp": device_module, "np": np, "a": operands(device_module)})
    if expression.startswith("xp.finfo"):
        assert actual == expected
    else:
        assert_same(host_value(actual, device_module), host_value(expected, np))


# ---- in place, views, layout --------------------------------------------------------------------------------------------


STATEMENTS = """
    x += 1 | x -= y | x *= 2 | x /= y | x //= 2 | x **= 2 | x %= 3 | x[0] = 7 | x[:, 1] = y[:, 0] | x[x > 0] = 0
    x[[0, 2]] = y[:2] | x[...] = v | x[1, 2] = y[0, 0] | x[1:, ::2] = np.float32(3) | x.fill(4) | x.sort(axis=1)
    x.T[...] = 1 | x[0].fill(2) | x.shape = (4, 3) | xp.add(x, y, out=x) | xp.exp(x, out=x) | xp.copyto(x, y)
    xp.put(x, k[:3], 9.0) | xp.fill_diagonal(x, 5) | xp.add.at(x, k[:3] % 3, 1.0) | xp.sum(y, axis=0, out=x[0])
    xp.add(x, 1, out=y, where=x > 0); x[...] = y | x.partition(2) | xp.maximum(x, 0, out=x.reshape(3, 4))
    xp.matmul(x, y.T, out=x[:, :3]) | y.sum(axis=1, out=x[:, 0]) | i = x.astype(int); i += 1; x[...] = i
    xp.cumsum(y, axis=1, out=x)
"""


@pytest.mark.contract("numpy")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "statement", [part.strip() for line in STATEMENTS.strip().splitlines() for part in line.split(" | ")]
)
def test_writes_what_numpy_writes(statement: str, device_module: Any) -> None:
    after = []
    for xp in (device_module, np):
        names = {**vars(operands(xp)), "xp": xp, "np": np}
        names["x"] = xp.array(names["x"])
        exec(compile(statement, "<table>", "exec"), names)
        after.append(host_value(names["x"], xp))
    assert_same(after[0], after[1])
