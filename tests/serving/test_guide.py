"""The examples of the guide, against a server of small models."""

import json
import re
import shlex

import httpx
import pytest

from dlm_jax.serving.engine import Engine
from tests.docs.pages import DOCS, blocks
from tests.serving.conftest import serving

PAGE = (DOCS / "guides" / "serve.md").read_text()
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def guide_server(lms):
    engine = Engine({"stories": lms["blocks"], "first": lms["full"]}, max_batch=1)
    engine.start()
    with serving(engine) as where:
        yield where
    engine.stop(drain=False)


def test_python_examples_run(guide_server, capsys):
    names: dict[str, object] = {}
    for block in blocks(PAGE):
        if block.language == "python":
            exec(compile(block.text.replace(ADDRESS, guide_server), f"guide, line {block.line}", "exec"), names)
    printed = capsys.readouterr().out
    assert "\N{LIGHT SHADE}" in printed and "Tom had a " in printed and "forward_passes" in printed


def test_curl_examples_are_answered(guide_server):
    commands = [shlex.split(block.text.replace("\\\n", " ")) for block in blocks(PAGE) if "curl" in block.text]
    assert commands
    for _, url, *arguments in commands:
        header, data = (arguments[arguments.index(name) + 1] for name in ("--header", "--data"))
        answer = httpx.post(url.replace(ADDRESS, guide_server), content=data, headers=dict([header.split(": ")]))
        assert answer.status_code == 200 and answer.json()["seed"] == json.loads(data)["seed"]


def test_metrics_and_fields_exist(guide_server):
    """Metrics that the page names are reported, and its fields of requests are known."""
    from dlm_jax.serving.protocol import CompletionRequest

    reported = httpx.get(f"{guide_server}/metrics").text
    assert all(name in reported for name in re.findall(r"`(dlm_[a-z_]+)`", PAGE))
    section = PAGE[PAGE.index("Settings of [`dlm sample`]") :]
    fields = set(re.findall(r"`(\w+)`", section[: section.index("```")])) - {"extra_body"}
    assert len(fields) > 10 and fields <= CompletionRequest.model_fields.keys()
