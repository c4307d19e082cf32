"""Every mutant is of the sources as they are; what notices it, ``python tests/mutants.py`` says."""

import pytest
from mutants import MUTANTS, ROOT


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_of_the_sources(name):
    mutant = MUTANTS[name]
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.new != mutant.old
