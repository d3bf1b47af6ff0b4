"""`dlm plan`: output, JSON, exit status and errors."""

import importlib.util
import json

import pytest

from tests.cli.test_main import run

TINY = ("--config=diffugpt_s", "--config.data.length=16", "--config.data.batch_size=64", "--config.model.mask_token=5")
with_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")


@pytest.fixture
def tiny(base) -> tuple[str, ...]:
    return "plan", *TINY, f"--config.model.source={base}"


def test_gpus(capsys, tmp_path, tiny):
    status, out, err = run(capsys, *tiny, "--gpu=h100:8,a100-80:4", f"--json={tmp_path / 'p.json'}")
    assert status == 0 and "h100:8: 8 chips, fsdp=8" in out and "a100-80:4: 4 chips" in out
    assert out.count("fits, by an estimate") == 2
    assert "not measured" in out and "Times are estimates" in out
    assert "h100:8: estimating data.batch_size=64" in err
    result = json.loads((tmp_path / "p.json").read_text())
    assert result["fits"] and result["config"]["data.length"] == 16 and result["model"]["mask_token_id"] is not None
    first, second = (entry["plan"] for entry in result["plans"])
    assert not first["is_compiled"]
    assert first["flops"]["model"] == second["flops"]["model"] and first["time"]["seconds"] < second["time"]["seconds"]


def test_status_and_suggestions_if_it_does_not_fit(capsys, tiny):
    status, out, err = run(capsys, *tiny, "--gpu=l4:1", "--config.data.batch_size=100000000", "--suggest", "--json=-")
    assert status == 3, err
    result = json.loads(out)
    assert not result["fits"] and result["plans"][0]["plan"]["time"] is None
    assert [trial["memory"]["fits"] for trial in result["plans"][0]["suggestions"]][:-1].count(True) == 0


@pytest.mark.parametrize(("arguments", "mentions"), [
    ((), "--topology"),
    (("--topology=v5e",), "v5e"),
    (("--gpu=h101:8",), "h101"),
    (("--gpu=h100:7",), "micro-batches"),
    (("--gpu=h100:8", "--config.data.length=64"), "32"),
    (("--gpu=h100:8", "--config.model.mask_token=300000"), "300000"),
    (("--gpu=h100:8", "--config.mesh.fsdp=3"), "8"),
    (("--gpu=h100:8", "--config.data.batchsize=3"), "data.batch_size"),
])
def test_errors_are_one_sentence(capsys, tiny, arguments, mentions):
    status, out, err = run(capsys, *tiny, *arguments)
    assert status == 1 and not out and mentions in err and err.count("\n") == 1


def test_without_libtpu(capsys, monkeypatch, tiny):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status, _, err = run(capsys, *tiny, "--topology=v5e:2x2")
    assert status == 1 and 'pip install "dlm_jax[tpu]"' in err


@with_libtpu
def test_tpu_slice(capsys, tmp_path, tiny):
    status, out, err = run(capsys, *tiny, "--topology=v5litepod-4", f"--json={tmp_path / 'p.json'}")
    assert status == 0 and "v5e:2x2: 4 chips, fsdp=4, tpu attention" in out and "of 15.75: fits" in out
    assert "v5e:2x2: compiling data.batch_size=64" in err
    plan = json.loads((tmp_path / "p.json").read_text())["plans"][0]["plan"]
    assert plan["is_compiled"] and plan["sent"]["all-reduce"]["bytes"] > 0 and plan["memory"]["limit"] == 15.75
