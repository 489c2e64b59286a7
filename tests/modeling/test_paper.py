"""The paper's table (Tables 1 and 2): parameters, and multiply-adds counted from the model as it runs."""

import pytest
from paper_table import PAPER, count


@pytest.mark.parametrize(("preset", "parameters", "multiply_adds"), PAPER)
def test_parameters_and_multiply_adds_are_those_of_the_paper(preset, parameters, multiply_adds):
    counted = count(preset)
    assert counted[0] == pytest.approx(parameters, abs=0.06)
    assert counted[1] == pytest.approx(multiply_adds, rel=0.015)
