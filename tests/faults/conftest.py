"""A tiny base model and corpus, and runs of the command line on them."""

import pytest

from tests.faults.runs import Runs
from tests.training.conftest import base, corpus  # noqa: F401


@pytest.fixture(scope="package")
def runs(base, corpus, tmp_path_factory) -> Runs:  # noqa: F811
    return Runs(base, corpus, tmp_path_factory.mktemp("faults"))
