"""Runs pytest on the CPU module that a sanitizer watches, in the place of the one beside the sources:

    python tests/sanitize.py build/asan-*/milkernels/_C_*.so tests/test_numbers.py ...

`make sanitize` builds it and calls this with the sanitizer's library preloaded.  A report ends the process.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch  # noqa: F401  whose libraries the module needs


def load(path: str) -> None:
    """A module that is loaded already is the one that milkernels takes."""
    name = "milkernels." + Path(path).name.partition(".")[0]
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


class Watched:
    """Says at the start that it is what the tests call; tests/conftest.py comes before milkernels."""

    def pytest_report_header(self):
        from milkernels import native

        assert native._extension is sys.modules[native._extension.__name__]
        return f"watched: {native._extension.__file__}"


if __name__ == "__main__":
    load(sys.argv[1])
    sys.exit(pytest.main(sys.argv[2:], plugins=[Watched()]))
