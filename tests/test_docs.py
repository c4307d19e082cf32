"""``help()`` of every op says what goes in and what comes out, and its examples run."""

import doctest
import importlib
import inspect
import pkgutil
import re

import pytest

import milkernels
from milkernels import ops

MODULES = [importlib.import_module(f"{ops.__name__}.{module.name}") for module in pkgutil.iter_modules(ops.__path__)]
EXAMPLES = [test for module in MODULES for test in doctest.DocTestFinder().find(module) if test.examples]


@pytest.mark.parametrize("op", ops.__all__)
def test_help_of_an_op(op):
    function = getattr(milkernels, op)
    text = inspect.getdoc(function)
    about, _, rest = text.partition("\nArgs:\n")
    said, _, rest = rest.partition("\nReturns:\n")
    returns, _, rest = rest.partition("\nRaises:\n")
    raises, _, example = rest.partition(">>> ")
    assert about and said and returns.strip() and re.search("TypeError|ValueError", raises), text
    assert re.search(rf"^>>> .*\b{op}\(", example, re.M), "an example that calls it"
    entries = re.findall(r"^    (\w[\w, ]*): ", said, re.M)
    names = [name for entry in entries for name in entry.split(", ")]
    assert names == list(inspect.signature(function).parameters), "each argument, in order"
    assert max(map(len, function.__doc__.splitlines())) <= 120


@pytest.mark.parametrize("example", EXAMPLES, ids=[test.name for test in EXAMPLES])
def test_examples(example):
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example)
    assert result.attempted and not result.failed


def test_every_op_has_an_example():
    found = {test.name.rpartition(".")[2] for test in EXAMPLES}
    assert set(ops.__all__) <= found
