"""What tests of tables share."""

import pytest

from fpn_ablate.report.collate import collate
from fpn_ablate.report.collate.definition import find_definition


@pytest.fixture
def three_seeds(monkeypatch):
    """Let Table 1 plan the seeds 2, 3 and 4, with 5, 6 and 7 for its A/A control, whatever seeds the evidence is of."""

    def definition(table, *arguments):
        found = find_definition(table, *arguments)
        if table != "table1_rpn" or not found.control:  # a test's own
            return found
        control = found.control.model_copy(update={"seeds": (5, 6, 7)})
        return found.model_copy(update={"seeds": (2, 3, 4), "control": control})

    monkeypatch.setattr(collate, "find_definition", definition)
