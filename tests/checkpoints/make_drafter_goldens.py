"""Runs the published modeling code of drafters on the files of `drafter_files`, and keeps what it computes.

    python -m tests.checkpoints.make_drafter_goldens --zlab=DFLASH/dflash/model.py --deepspec=DEEPSPEC

`--zlab` is a file of github.com/z-lab/dflash (of August 2026: `DFlash2DraftModel` is in it), `--deepspec` a checkout of
github.com/deepseek-ai/DeepSpec. Writes `drafter_goldens.npz`, by case and name:

    logits      float32 [anchors, drafts, vocab], of the drafts, with those of a Markov head along its greedy drafts
    drafts      int [anchors, drafts], greedy
    confidence  float32 [anchors, drafts], log odds
    text        int [tokens], the greedy text after `drafter_files.prompt()`, by speculative decoding
    accepted    int [passes], drafts that the target accepted in each
"""

import argparse
import importlib.util
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers

from tests.checkpoints import drafter_files

ANCHORS = (3, 9, 20)
NEW_TOKENS = 36
GOLDENS = Path(__file__).with_name("drafter_goldens.npz")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zlab", required=True)
    parser.add_argument("--deepspec", required=True)
    arguments = parser.parse_args()
    spec = importlib.util.spec_from_file_location("zlab", arguments.zlab)
    zlab = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(zlab)
    sys.path.insert(0, arguments.deepspec)
    goldens = {}
    for case, (target_name, config) in drafter_files.CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            target_folder, drafter_folder = Path(folder) / "target", Path(folder) / "drafter"
            target = drafter_files.write_target(target_name, target_folder)
            drafter_files.write_drafter(case, drafter_folder, target_folder)
            with torch.inference_mode():
                run = run_deepspec if config["architectures"] == ["Qwen3DSparkModel"] else run_zlab
                result = run(target, drafter_folder, config["architectures"][0], zlab)
        greedy = greedy_text(target)
        assert (result["text"] == greedy[: len(result["text"])]).all(), case
        print(f"{case}: {result['accepted'].sum()} of {len(result['text'])} tokens were drafts, in "
              f"{len(result['accepted'])} passes")
        goldens |= {f"{case}/{name}": value for name, value in result.items()}
    np.savez_compressed(GOLDENS, **goldens)
    print(f"{GOLDENS.stat().st_size} bytes")


def greedy_text(target: transformers.PreTrainedModel) -> np.ndarray:
    """Returns the target's own greedy text, without a cache."""
    tokens = torch.from_numpy(drafter_files.prompt())[None]
    with torch.inference_mode():
        for _ in range(NEW_TOKENS):
            tokens = torch.cat([tokens, target(tokens).logits[:, -1:].argmax(-1)], dim=1)
    return tokens[0, -NEW_TOKENS:].numpy()


def features(target: transformers.PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    states = target(tokens, output_hidden_states=True).hidden_states
    return torch.cat([states[layer + 1] for layer in drafter_files.IDS], dim=-1)


def load(kind: type, folder: Path) -> torch.nn.Module:
    model, report = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32,
                                         attn_implementation="sdpa")
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    return model.eval()


def run_zlab(target: transformers.PreTrainedModel, folder: Path, name: str, zlab: SimpleNamespace) -> dict:
    model, tokens = load(getattr(zlab, name), folder), torch.from_numpy(drafter_files.prompt())[None]
    logits, drafts = [], []
    for anchor in ANCHORS:
        block = torch.full((1, drafter_files.BLOCK), drafter_files.MASK)
        block[:, 0] = tokens[:, anchor]
        hidden = model(torch.arange(anchor + drafter_files.BLOCK)[None],
                       noise_embedding=target.model.embed_tokens(block),
                       target_hidden=features(target, tokens[:, :anchor]))[:, 1:]
        logits.append(model.compute_logits(hidden, target.lm_head)[0])
        drafts.append(model.propose(hidden, block[:, 0], target.lm_head, 0.0)[0][0] if hasattr(model, "propose")
                      else logits[-1].argmax(-1))
    decoded = zlab.dflash_generate(model, target, tokens, NEW_TOKENS, None, return_stats=True)
    return {"logits": torch.stack(logits).numpy(), "drafts": torch.stack(drafts).numpy(),
            "text": decoded.output_ids[0, tokens.shape[1] :].numpy(),
            "accepted": np.array(decoded.acceptance_lengths) - 1}


def crop_to(cache: transformers.DynamicCache, length: int) -> None:
    """Crops as transformers did when DeepSpec was written: to a length, not by one."""
    _crop(cache, min(length - cache.get_seq_length(), 0))


_crop = transformers.DynamicCache.crop


def run_deepspec(target: transformers.PreTrainedModel, folder: Path, name: str, _: SimpleNamespace) -> dict:
    from deepspec.eval.base_evaluator import generate_decoding_sample
    from deepspec.eval.dspark.evaluator import Qwen3DSparkEvaluator
    from deepspec.modeling.dspark.qwen3 import Qwen3DSparkModel

    model, tokens = load(Qwen3DSparkModel, folder), torch.from_numpy(drafter_files.prompt())[None]
    results = {"logits": [], "drafts": [], "confidence": []}
    for anchor in ANCHORS:
        block = torch.full((1, drafter_files.BLOCK), drafter_files.MASK)
        block[:, 0] = tokens[:, anchor]
        hidden = model._forward_backbone(
            position_ids=torch.arange(anchor + drafter_files.BLOCK)[None], noise_embedding=model.embed_tokens(block),
            target_hidden_states=features(target, tokens[:, :anchor]), attention_mask=None, is_causal=False)
        drafts, logits = model.sample_draft_tokens(
            model.compute_logits(hidden), first_prev_token_ids=block[:, 0], hidden_states=hidden)
        previous = torch.cat([block[:, :1], drafts[:, :-1]], dim=1)
        results["logits"].append(logits[0].numpy())
        results["drafts"].append(drafts[0].numpy())
        if model.confidence_head is not None:
            results["confidence"].append(model.predict_confidence_step(hidden, previous)[0].numpy())
    evaluator = SimpleNamespace(draft_model=model, max_proposal_tokens=drafter_files.BLOCK,
                                args=SimpleNamespace(temperature=0.0, confidence_threshold=0.0))
    transformers.DynamicCache.crop = crop_to
    methods = {name: getattr(Qwen3DSparkEvaluator, f"_{name}").__get__(evaluator)
               for name in ("init_context", "propose", "update")}
    decoded = generate_decoding_sample(
        target_model=target, input_ids=tokens, max_new_tokens=NEW_TOKENS, max_proposal_tokens=drafter_files.BLOCK,
        temperature=0.0, stop_token_ids=None, **methods)
    transformers.DynamicCache.crop = _crop
    return {name: np.stack(values) for name, values in results.items() if values} | {
        "text": decoded.output_ids[0, tokens.shape[1] :].numpy(), "accepted": np.array(decoded.accepted_draft_lengths)}


if __name__ == "__main__":
    main()
