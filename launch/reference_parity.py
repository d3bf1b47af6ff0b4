"""Compares our logits with those of the DiffuLLaMA reference implementation, for reproduce_paper.sh.

  reference_parity.py reference CHECKOUT MODEL BASE OUT.npz   in a Python with the reference's requirements
  reference_parity.py compare MODEL OUT.npz RESULT.json       in a Python with dlm_jax
"""

import json
import pathlib
import sys

import numpy as np


def reference(checkout: str, model: str, base: str, out: str) -> None:
    """Saves the reference's bidirectional logits, float32 on the CPU, of random tokens of which a third is masked."""
    sys.path.insert(0, checkout)
    import torch
    from model import DiscreteDiffusionModel, get_anneal_attn_mask
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config, tokenizer = AutoConfig.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    if config.model_type == "gpt2":
        net = DiscreteDiffusionModel.from_pretrained(model, model=base, config=config, tokenizer=tokenizer,
                                                     device="cpu")
    else:
        net = AutoModelForCausalLM.from_pretrained(model, torch_dtype=torch.float32)
        net = DiscreteDiffusionModel(model=net, config=config, tokenizer=tokenizer, device="cpu")
    rng = np.random.default_rng(0)
    tokens = rng.integers(100, config.vocab_size, (2, 64))
    tokens[rng.random(tokens.shape) < 1 / 3] = tokenizer.mask_token_id
    attention = get_anneal_attn_mask(64, 2, dtype=torch.float32, device="cpu", attn_mask_ratio=1.0)
    with torch.no_grad():
        logits = net.eval().float()(torch.from_numpy(tokens), attention_mask=attention)
    np.savez(out, tokens=tokens, logits=logits.numpy(), mask_token_id=tokenizer.mask_token_id)


def compare(model: str, reference_file: str, result: str) -> None:
    """Writes the largest difference of log-probabilities, and how often the most likely tokens differ."""
    import jax

    from dlm_jax import AttentionMask, DiffusionLM

    jax.config.update("jax_default_matmul_precision", "highest")
    stored = np.load(reference_file)
    lm = DiffusionLM.from_pretrained(model, mask_token=int(stored["mask_token_id"]), dtype="float32")
    ours = np.asarray(lm.logits(stored["tokens"].astype(np.int32), attention=AttentionMask.bidirectional()))
    size = min(ours.shape[-1], stored["logits"].shape[-1])  # the reference pads its vocabulary
    ours, reference = (np.asarray(jax.nn.log_softmax(each[..., :size])) for each in (ours, stored["logits"]))
    numbers = {"max_difference": float(np.abs(ours - reference).max()),
               "other_argmax": float((ours.argmax(-1) != reference.argmax(-1)).mean())}
    pathlib.Path(result).write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    {"reference": reference, "compare": compare}[sys.argv[1]](*sys.argv[2:])
