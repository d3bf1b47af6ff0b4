"""The site builds without a warning, and what the pages mark to be run runs."""

import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from tests.docs.pages import DOCS, NOTEBOOK, ROOT, blocks

RUN = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")
             if any(block.runs for block in blocks(path.read_text())))
SHORT = "guides/install.md"


def build(source: pathlib.Path, destination: pathlib.Path) -> subprocess.CompletedProcess:
    """Builds as launch/docs.sh does, without the installation."""
    if not all(importlib.util.find_spec(name) for name in ("material", "mkdocs", "mkdocstrings")):
        pytest.skip("mkdocs is not installed: pip install 'dlm-jax[docs]'")
    return subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={destination}"],
                          cwd=source, text=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    built = build(ROOT, folder)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_a_broken_link_stops_the_build(tmp_path):
    for folder in ("docs", "launch"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    with (tmp_path / "docs" / "index.md").open("a") as page:
        page.write("\n[a heading that is not there](guides/adapt.md#no-such-heading)\n")
    built = build(tmp_path, tmp_path / "site")
    assert built.returncode != 0 and "no-such-heading" in built.stdout + built.stderr


def test_site_has_the_generated_pages(site):
    configuration = (site / "reference" / "configuration" / "index.html").read_text()
    assert "optimizer.accumulate_steps" in configuration and "micro-batches per step" in configuration
    assert "--cache_refresh_interval" in (site / "reference" / "cli" / "index.html").read_text()
    assert "from_pretrained" in (site / "reference" / "api" / "index.html").read_text()
    assert (site / NOTEBOOK).is_file()


def test_pages_load_nothing_from_other_hosts(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|iframe|source)[^>]*\ssrc="([^"]+)"', page.read_text())
        loaded += re.findall(r'<link[^>]*rel="(?:stylesheet|preload|preconnect|icon)"[^>]*', page.read_text())
        assert not [address for address in loaded if re.search(r"(?:https?:)?//", address)], page


@pytest.mark.parametrize("page", [SHORT, *(pytest.param(page, marks=pytest.mark.slow)
                                           for page in [*RUN, NOTEBOOK] if page != SHORT)])
def test_marked_blocks_run(page, tmp_path):
    """In one process per page, on one device, as a reader would."""
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    ran = subprocess.run([sys.executable, "-m", "tests.docs.run_page", page], cwd=tmp_path, text=True,
                         capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""})
    assert ran.returncode == 0, f"{ran.stdout[-2000:]}\n{ran.stderr[-4000:]}"
