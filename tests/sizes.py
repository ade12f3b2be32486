"""The small size of a test, which always runs, and the whole one, which `pytest -m campaign` adds."""

import pytest

from tests.tiny import FAMILIES


def campaign_but_for(cases, *small):
    """Mark all cases of a test but a few as the campaign's: `pytest.mark.parametrize` takes what this gives."""
    wrapped = [case if isinstance(case, tuple) else (case,) for case in cases]
    marked = [pytest.param(*values, marks=pytest.mark.campaign) for values in wrapped]
    return [case if case in small else param for case, param in zip(cases, marked, strict=True)]


SOME_FAMILIES = campaign_but_for(FAMILIES, "llama", "gpt2")  # one with rotary positions, one with learned ones
