"""Which names the emulated array module has: those of CuPy 14's NumPy API, as far as NumPy can do their work.

Theory of operation. A name that NumPy has and CuPy does not must fail here as it will fail on a real device, so what the
module delegates is an explicit list. `QUESTIONS` look at types and shapes and are NumPy's own functions; `CREATION` makes
device arrays out of host values; `FUNCTIONS` take device arrays. `LACKING` are names of CuPy that cannot be emulated, with
the reason, for messages.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np


def words(text: str) -> frozenset[str]:
    """Return the words of a text, for tables that are easier to read as text."""
    return frozenset(text.split())


#: Names that CuPy still has and NumPy no longer: what they stand for.
CONSTANTS = {
    **dict.fromkeys(("Inf", "Infinity", "PINF", "infty"), math.inf),
    **dict.fromkeys(("NAN", "NaN"), math.nan),
    "NINF": -math.inf,
    "NZERO": -0.0,
    "PZERO": 0.0,
    "float_": np.float64,
    "singlecomplex": np.complex64,
    **dict.fromkeys(("complex_", "cfloat"), np.complex128),
}
ALIASES: dict[str, Callable[..., Any]] = {
    "alltrue": np.all,
    "cumproduct": np.cumprod,
    "in1d": lambda ar1, ar2, *options, **named: np.isin(np.ravel(ar1), ar2, *options, **named),
    "msort": lambda a: np.sort(a, axis=0),
    "product": np.prod,
    "round_": np.round,
    "row_stack": np.vstack,
    "sometrue": np.any,
    "trapz": np.trapezoid,
}
STRIDE_TRICKS = frozenset({"sliding_window_view"})
EXCEPTIONS = words(
    "AxisError ComplexWarning ModuleDeprecationWarning RankWarning TooHardError VisibleDeprecationWarning"
)

CONSTANTS_AND_TYPES = words(
    """
    e euler_gamma inf nan newaxis pi s_ index_exp
    dtype finfo iinfo generic number integer signedinteger unsignedinteger inexact floating complexfloating
    bool bool_ int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128
    byte ubyte short ushort intc uintc int_ uint intp uintp long ulong longlong ulonglong half single double csingle cdouble
    get_printoptions set_printoptions printoptions format_float_positional format_float_scientific broadcast_shapes
    iterable ndindex
    """
)

QUESTIONS = words(
    """
    base_repr binary_repr can_cast common_type iscomplexobj isdtype isfortran isrealobj isscalar issubdtype
    may_share_memory min_scalar_type mintypecode ndim promote_types result_type shape shares_memory size typename
    array_repr array_str array2string
    """
)

CREATION = words(
    """
    arange bartlett blackman diag_indices eye frombuffer fromfile fromiter fromstring genfromtxt hamming hanning identity
    indices kaiser linspace loadtxt logspace mask_indices tri tril_indices triu_indices
    """
)

UFUNCS = words(
    """
    abs absolute add arccos arccosh arcsin arcsinh arctan arctan2 arctanh bitwise_and bitwise_not bitwise_or bitwise_xor
    cbrt ceil conj conjugate copysign cos cosh deg2rad degrees divide divmod equal exp exp2 expm1 fabs float_power floor
    floor_divide fmax fmin fmod frexp gcd greater greater_equal heaviside hypot invert isfinite isinf isnan lcm ldexp
    left_shift less less_equal log log10 log1p log2 logaddexp logaddexp2 logical_and logical_not logical_or logical_xor
    matmul maximum minimum mod modf multiply negative nextafter not_equal positive power rad2deg radians reciprocal
    remainder right_shift rint sign signbit sin sinh sqrt square subtract tan tanh true_divide trunc
    acos acosh asin asinh atan atan2 atanh bitwise_count bitwise_invert bitwise_left_shift bitwise_right_shift pow
    """
)

FUNCTIONS = words(
    """
    all allclose amax amin angle any append apply_along_axis argmax argmin argpartition argsort argwhere around
    array_equal array_equiv array_split astype atleast_1d atleast_2d atleast_3d average bincount
    broadcast_arrays broadcast_to choose clip column_stack compress concat concatenate convolve copyto corrcoef correlate
    count_nonzero cov cross cumprod cumsum cumulative_prod cumulative_sum delete
    diag diag_indices_from diagflat diagonal diff digitize dot dsplit dstack
    ediff1d einsum expand_dims extract fill_diagonal fix flatnonzero flip fliplr flipud gradient histogram histogram2d
    histogramdd hsplit hstack i0 imag inner interp intersect1d isclose iscomplex isin isneginf isposinf isreal ix_
    kron lexsort matrix_transpose max mean median meshgrid min moveaxis nan_to_num nanargmax nanargmin nancumprod nancumsum
    nanmax nanmean nanmedian nanmin nanprod nanstd nansum nanvar nonzero outer packbits pad partition percentile
    permute_dims piecewise place polyfit polyval prod ptp put put_along_axis putmask quantile ravel ravel_multi_index real
    real_if_close repeat reshape resize roll rollaxis roots rot90 round searchsorted select setdiff1d setxor1d sinc
    sort sort_complex split squeeze stack std sum swapaxes take take_along_axis tensordot tile trace transpose trapezoid
    tril tril_indices_from trim_zeros triu triu_indices_from union1d unique
    unique_all unique_counts unique_inverse unique_values unpackbits unravel_index unwrap
    vander var vdot vsplit vstack where
    """
)

LINALG = words(
    """
    cholesky cond cross det eig eigh eigvals eigvalsh inv lstsq matmul matrix_power matrix_rank matrix_transpose norm
    pinv qr slogdet solve svd tensorinv tensorsolve
    """
)

FFT = words(
    """
    fft fft2 fftn fftshift hfft ifft ifft2 ifftn ifftshift ihfft irfft irfft2 irfftn rfft rfft2 rfftn
    """
)
FFT_CREATION = frozenset({"fftfreq", "rfftfreq"})

TESTING = words(
    """
    assert_allclose assert_array_almost_equal assert_array_almost_equal_nulp assert_array_equal assert_array_less
    assert_array_max_ulp
    """
)

#: The methods of `RandomState`, and functions of `random`.
RANDOM_STATE = words(
    """
    beta binomial chisquare choice dirichlet exponential f gamma geometric gumbel hypergeometric laplace logistic
    lognormal logseries multivariate_normal negative_binomial noncentral_chisquare noncentral_f normal pareto
    permutation poisson power rand randint randn random_sample rayleigh shuffle
    standard_cauchy standard_exponential standard_gamma standard_normal standard_t triangular uniform vonmises wald weibull
    zipf
    """
)
#: Functions of `random` only: what each of them draws from a `RandomState` of NumPy.
RANDOM = {
    **{name: name for name in RANDOM_STATE},
    **{name: name for name in ("bytes", "multinomial")},
    **dict.fromkeys(("random", "ranf", "sample"), "random_sample"),
    "random_integers": "random_integers",
}
#: The methods of a `Generator`: CuPy's has these, and no other of NumPy's.
GENERATOR = words(
    """
    beta binomial chisquare dirichlet exponential f gamma geometric hypergeometric integers logseries poisson power random
    standard_exponential standard_gamma standard_normal uniform
    """
)

_CUDA_CODE = "it compiles CUDA code, and there is no CUDA device; keep such kernels behind a test for a real one"
_NOT_YET = "afield's emulation does not have it; write it with other functions, or run this on a real device"

LACKING = {
    **dict.fromkeys(("RawKernel", "RawModule", "ElementwiseKernel", "ReductionKernel", "vectorize"), _CUDA_CODE),
    **dict.fromkeys(
        words("apply_over_axes broadcast c_ r_ flatiter fromfunction memoize clear_memo require"), _NOT_YET
    ),
    **dict.fromkeys(words("asarray_chkfinite poly poly1d polyadd polymul polysub"), _NOT_YET),
}
LACKING_IN_CUDA = {
    **dict.fromkeys(words("Function Module nvrtc cub"), _CUDA_CODE),
    **dict.fromkeys(
        words(
            """
        CFunctionAllocator Graph Memory ManagedMemory MemoryAsync MemoryAsyncPool MemoryHook PinnedMemory
        PinnedMemoryPointer PythonFunctionAllocator alloc_pinned_memory compiler driver function graph malloc_async
        malloc_managed memory_hook memory_hooks nvtx pinned_memory profile profiler texture thrust using_allocator
            """
        ),
        _NOT_YET,
    ),
}
LACKING_IN_CUDA_MEMORY = dict.fromkeys(
    words("CFunctionAllocator ManagedMemory Memory MemoryAsync MemoryAsyncPool PythonFunctionAllocator malloc_managed"),
    _NOT_YET,
)
LACKING_IN_RUNTIME = dict.fromkeys(
    words(
        """
        graphLaunch graphInstantiate hostAlloc hostRegister hostUnregister freeHost ipcGetMemHandle ipcOpenMemHandle
        ipcGetEventHandle ipcOpenEventHandle mallocManaged mallocArray memAdvise memPrefetchAsync memcpy2D memcpy2DAsync
        memcpy3D memcpy3DAsync pointerGetAttributes streamAddCallback streamBeginCapture streamEndCapture launchHostFunc
        deviceEnablePeerAccess deviceDisablePeerAccess deviceGetLimit deviceSetLimit
        """
    ),
    _NOT_YET,
)

LACKING_IN_EXTRAS = {
    **dict.fromkeys(words("GeneralizedUFunc optimizing profiler time"), _CUDA_CODE),
    **dict.fromkeys(
        words("DeviceSynchronized allow_synchronize errstate get_runtime_info geterr linalg seterr"), _NOT_YET
    ),
}
LACKING_IN_SCIPY = {"sparse": _NOT_YET}

#: What `creation` makes itself.
CREATED = words(
    "array asarray asanyarray ascontiguousarray asfortranarray asnumpy copy empty zeros ones full "
    "empty_like zeros_like ones_like full_like from_dlpack load save savez savez_compressed savetxt mgrid ogrid fuse"
)

#: The functions of NumPy that take device arrays, by NumPy's module: those that CuPy has under the same name.
OF_MODULE = {
    "numpy": CREATED | QUESTIONS | CREATION | FUNCTIONS | frozenset(LACKING),
    "numpy.linalg": LINALG,
    "numpy.fft": FFT | FFT_CREATION,
    "numpy.lib.stride_tricks": STRIDE_TRICKS,
}

#: What is looked up in NumPy by its name.
OF_NUMPY = CONSTANTS_AND_TYPES | QUESTIONS | CREATION | UFUNCS | FUNCTIONS
