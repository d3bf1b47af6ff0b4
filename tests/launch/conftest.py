import pytest

from tests.launch.stand_in_cloud import Cloud


@pytest.fixture
def cloud(tmp_path):
    """Makes a cloud; its processes end with the test."""
    made = []

    def make(**scenario) -> Cloud:
        made.append(Cloud(tmp_path, **scenario))
        return made[-1]

    yield make
    for each in made:
        each.close()
