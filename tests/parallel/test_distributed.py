import pytest

from dlm_jax.errors import ConfigError
from dlm_jax.parallel import broadcast_from_process_zero, initialize_distributed


@pytest.mark.parametrize(("arguments", "message"), [
    (("auto", 2, 0), "auto finds number and place of this process by itself"),
    (("auto", None, 0), "auto finds number and place of this process by itself"),
    (("host:1234", 2), "host:1234 needs the number of processes and which of them this is"),
    (("host:1234", None, 1), "host:1234 needs the number of processes and which of them this is"),
    (("host:1234", 2, 2), "process 2 is none of 2; they are counted from 0"),
])
def test_arguments_that_contradict_each_other_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        initialize_distributed(*arguments)


def test_one_process_tells_itself():
    assert broadcast_from_process_zero(lambda: [1, "two"]) == [1, "two"]
