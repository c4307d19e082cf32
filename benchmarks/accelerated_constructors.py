"""A pytest plug-in: models of torchmil are passed to `milkernels.accelerate` as soon as they are constructed.

For torchmil's own tests (``python -m benchmarks.upstream --torchmil-tests``), in their process only.  What was
constructed and how much of it was changed is counted, so that nobody takes tests of unchanged models for evidence.
"""

import collections
import functools
import importlib
import json
from collections.abc import Callable
from pathlib import Path

import milkernels

CLASSES = {
    "ABMIL": "torchmil.models",
    "DSMIL": "torchmil.models",
    "CLAM_SB": "torchmil.models",
    "AttentionPool": "torchmil.nn.attention.attention_pool",
}
constructed: collections.Counter = collections.Counter()
changed: collections.Counter = collections.Counter()  # at once, or waiting for the first call with lazy parameters
_depth = 0  # of constructors that have not finished: a part is accelerated with the whole


def accelerated(cls: type) -> Callable[..., None]:
    """The constructor of ``cls``, after which the outermost of the instances under construction is accelerated."""
    original = cls.__init__

    @functools.wraps(original)
    def construct(self, *args, **kwargs):
        global _depth
        _depth += 1
        try:
            original(self, *args, **kwargs)
        finally:
            _depth -= 1
        if _depth == 0:
            done = milkernels.accelerate(self, min_instances=0)
            constructed[cls.__name__] += 1
            changed[cls.__name__] += bool(done.changed or done.waiting)

    return construct


def pytest_addoption(parser):
    parser.addoption("--accelerated-counts", type=Path, help="JSON file for the counts")


def pytest_configure(config):
    for name, module in CLASSES.items():
        cls = getattr(importlib.import_module(module), name)
        cls.__init__ = accelerated(cls)


def pytest_terminal_summary(terminalreporter, config):
    for name, count in constructed.items():
        terminalreporter.write_line(f"accelerated constructors: {name}, {changed[name]} of {count} changed")
    if path := config.getoption("--accelerated-counts"):
        path.write_text(json.dumps({"constructed": constructed, "changed": changed}))
