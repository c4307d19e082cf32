"""One registry of op cases that the tests and the benchmarks both iterate.

An ``OpCase`` knows how to make inputs for its op, how to call it on a backend, the formula that people
write in its place in eager PyTorch, and the arithmetic and traffic that the op cannot avoid.  An added kernel
inherits every test and benchmark that iterates ``CASES``.  ``error_promise`` is the accuracy that the library
promises.
"""

from milkernels.testing.arguments import public_arguments, public_name
from milkernels.testing.cases import MODES, OpCase, embedded_sizes
from milkernels.testing.inputs import FEATURES, Inputs, Shape, even_lengths, skewed_lengths, small_lengths
from milkernels.testing.philox import PHILOX_VECTORS, dropout_keep, philox4x32
from milkernels.testing.promise import (
    Promise,
    Reference,
    Verdict,
    by_head,
    eager_errors,
    error_promise,
    errors_of,
    evaluate,
    float64_reference,
    kinks,
    promise_from_errors,
)
from milkernels.testing.registry import CASES, FIXED, SIZES

__all__ = [
    "CASES",
    "FEATURES",
    "FIXED",
    "MODES",
    "PHILOX_VECTORS",
    "SIZES",
    "Inputs",
    "OpCase",
    "Promise",
    "Reference",
    "Shape",
    "Verdict",
    "by_head",
    "dropout_keep",
    "embedded_sizes",
    "eager_errors",
    "error_promise",
    "errors_of",
    "evaluate",
    "even_lengths",
    "float64_reference",
    "kinks",
    "philox4x32",
    "promise_from_errors",
    "public_arguments",
    "public_name",
    "skewed_lengths",
    "small_lengths",
]
