import pytest

from dlm_jax.errors import ConfigError
from dlm_jax.parallel import broadcast_from_process_zero, initialize_distributed


@pytest.mark.parametrize("arguments, mentions", [
    (("auto", 2, 0), "auto.*num_processes"),
    (("auto", None, 0), "auto.*process_id"),
    (("host:1234", 2), "host:1234.*process_id"),
    (("host:1234", None, 1), "host:1234.*num_processes"),
    (("host:1234", 2, 2), "process_id.*2"),
])
def test_contradictory_arguments_are_refused(arguments, mentions):
    with pytest.raises(ConfigError, match=mentions):
        initialize_distributed(*arguments)


def test_broadcast_in_one_process():
    assert broadcast_from_process_zero(lambda: [1, "two"]) == [1, "two"]
