"""`dlm evaluate --lm_eval`: lm-eval's table of two models on tasks in a folder, and refusals."""

import json
import pathlib
import sys

import pytest
import yaml

from dlm_jax.cli.main import main

SHIPPED = pathlib.Path(__file__).parents[2] / "assets" / "stories-gpt2"
ROWS = [{"text": f"The {animal} ran to the tree.", "options": ["up.", "on and on."], "gold": n % 2}
        for n, animal in enumerate(("cat", "dog", "bird", "boy"))]


@pytest.fixture(scope="module")
def harness_dir(tmp_path_factory):
    import datasets
    import lm_eval.tasks.manager

    folder = tmp_path_factory.mktemp("own")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "likely.jsonl").write_text(json.dumps({"text": "Once upon a", "options": ["time", "tree"], "gold": 0}))
    own = {"dataset_path": "json", "dataset_kwargs": {"data_files": str(folder / "rows.jsonl")}, "test_split": "train"}
    choice = own | {"output_type": "multiple_choice", "doc_to_text": "{{text}}", "doc_to_choice": "{{options}}",
                    "doc_to_target": "gold", "fewshot_split": "train"}
    word = own | {"output_type": "loglikelihood", "doc_to_text": "The", "doc_to_target": "{{text[3:7]}}",
                  "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}]}
    for name, config in {
            "own_choice": choice | {"metric_list": [{"metric": "acc"}]},
            "own_exact": choice | {"dataset_kwargs": {"data_files": str(folder / "likely.jsonl")}, "metric_list": [
                {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]},
            "own_validation": choice | {"test_split": None, "validation_split": "train"},
            "standard": word, "own_bare": word | {"num_fewshot": 0},
            "own_shown": word | {"fewshot_split": "train"},
            "own_writing": own | {"output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "up",
                                  "fewshot_split": "train", "metric_list": [{"metric": "exact_match"}]},
            "own_code": own | {"output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "up",
                               "unsafe_code": True},
            "own_lost": choice | {"dataset_kwargs": {"data_files": str(folder / "none.jsonl")}}}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **config}))
    (folder / "own_group.yaml").write_text(yaml.safe_dump({"group": "own_group", "task": ["own_choice"],
                                                           "aggregate_metric_list": [{"metric": "acc"}]}))
    (folder / "own_broken.yaml").write_text("task: [")
    (folder / "shipped").mkdir()  # in place of lm-eval's own thousands of tasks
    (folder / "standard.yaml").rename(folder / "shipped" / "standard.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        patch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
        patch.setattr(lm_eval.tasks.manager, "__file__", str(folder / "shipped" / "manager.py"))
        yield folder


def evaluate(capsys, *argv):
    status = main(["evaluate", f"--model={SHIPPED}", *map(str, argv)])
    return status, *capsys.readouterr()


def test_table_with_parent(capsys, harness_dir, tmp_path):
    out = tmp_path / "results.json"
    arguments = ("--lm_eval=own_choice,own_shown,own_writing", f"--lm_eval_dir={harness_dir}", "--num_masks=3",
                 "--limit=3", "--shots=1")
    status, table, err = evaluate(capsys, *arguments, "--num_steps=2", "--mask_token=4000", f"--parent={SHIPPED}",
                                  f"--out={out}")
    assert status == 0 and not err, err
    assert table.count("|own_choice") == 2 and f"{SHIPPED} (parent)" in table and "bootstrapping" not in table
    assert f"Likelihoods of {SHIPPED} are bounds" in table
    assert "own_writing asks for texts of 256 tokens; 128 are generated" in table
    found = json.loads(out.read_text())
    assert found["models"] == [str(SHIPPED), f"{SHIPPED} (parent)"] and found["settings"]["seed"] == 0
    assert found["versions"]["lm-eval"] and found["settings"]["num_masks"] == 3
    model, parent = (found["lm_eval"][name] for name in found["models"])
    assert model["n-samples"]["own_choice"] == {"original": 4, "effective": 3} and model["n-shot"]["own_choice"] == 1
    asked, of_parent = ([sample["arguments"] for sample in one["samples"]["own_choice"]] for one in (model, parent))
    assert asked == of_parent and all("on and on." in argument[0][0] or "up." in argument[0][0] for argument in asked)
    assert model["results"]["own_shown"] != parent["results"]["own_shown"]
    assert "own_shown" in parent["results"] and parent["results"]["own_shown"]["perplexity,none"] > 1

    # The parent as the model itself, the result as JSON alone.
    status, text, err = evaluate(capsys, *arguments, "--objective=autoregressive", "--json=-")
    assert status == 0 and not err, err
    again = json.loads(text)["lm_eval"][str(SHIPPED)]
    assert again["results"] == parent["results"] and "samples" not in again


def test_groups_and_greedy_metrics(capsys, harness_dir):
    status, text, err = evaluate(capsys, "--lm_eval=own_group,own_exact,standard", f"--lm_eval_dir={harness_dir}",
                                 "--objective=autoregressive", "--json=-")
    assert status == 0 and not err, err
    found = json.loads(text)["lm_eval"][str(SHIPPED)]
    assert found["groups"]["own_group"]["acc,none"] == found["results"]["own_choice"]["acc,none"]
    assert found["results"]["own_exact"]["exact_match,none"] == 1.0


@pytest.mark.parametrize(("arguments", "named"), [
    (("--lm_eval=own_choise",), "own_choice"),
    (("--lm_eval=own_broken",), "own_broken"),
    (("--lm_eval=own_lost",), "--lm_eval=own_lost"),
    (("--lm_eval=own_code",), "own_code"),
    (("--lm_eval=own_bare", "--shots=2"), "own_bare"),
    (("--lm_eval=standard", "--shots=1"), "standard"),
    (("--lm_eval=own_validation", "--shots=1"), "own_validation"),
    (("--lm_eval=own_choice", "--shots=4"), "--shots=4"),
    (("--lm_eval=own_choice,own_choice",), "own_choice,own_choice"),
    (("--lm_eval=own_choice", "--limit=0"), "--limit"),
    (("--lm_eval=own_choice", "--lm_eval_dir=nowhere"), "nowhere"),
    (("--lm_eval=own_choice", "--out=results.txt"), "results.txt"),
    (("--lm_eval=own_choice", "--protocol=reference"), "--protocol"),
    (("--tasks=piqa",), "--lm_eval_dir"),
    (("--data", __file__, "--limit=3"), "--limit"),
    (("--lm_eval=own_choice", "--tasks=piqa"), "--examples"),
    (("--lm_eval=own_choice",), "--mask_token"),
])
def test_refusals(capsys, harness_dir, arguments, named):
    own = () if "--data" in arguments else (f"--lm_eval_dir={harness_dir}",)
    status, out, err = evaluate(capsys, *own, *arguments)
    assert status == 1 and not out and named in err and err.count("\n") == 1


def test_missing_lm_eval(capsys, monkeypatch, harness_dir):
    monkeypatch.delitem(sys.modules, "dlm_jax.evaluation.lm_eval", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    status, _, err = evaluate(capsys, "--lm_eval=own_choice", f"--lm_eval_dir={harness_dir}")
    assert status == 1 and "dlm-jax[evaluation]" in err and err.count("\n") == 1
