"""The time of a training step (noise, forward, backward, AdamW), dlm_jax compared with PyTorch, in turns in one run.

    python benchmarks/train_step.py                                             GPT-2 small, 2 x 512, float32: a CPU
    python benchmarks/train_step.py --model=gpt2-medium --batch_size=32 --length=1024 --dtype=bfloat16      a GPU
    python benchmarks/train_step.py --model=llama2-7b --layers=8 --batch_size=8 --length=2048 --dtype=bfloat16

Both start from random weights and see the same random tokens; times are sampled from U(0, 1) on both sides, half of the
tokens are masked on average. PyTorch runs transformers' model with a 4-D attention mask under SDPA, full logits and its
own AdamW, as the DiffuLLaMA reference does, and with --lora=RANK PEFT's LoRA. The two take turns, so that other load
affects both. Prints a table of seconds per step, and writes
benchmarks/results/train_step-MODEL-DEVICE-DTYPE-dropoutRATE[-loraRANK].json.

    python benchmarks/train_step.py --annealed=off --profile=/tmp/trace         where our time goes on a CPU, as a table
"""

import argparse
import contextlib
import statistics
from collections.abc import Callable

import harness
import numpy as np
from harness import HF_CONFIGS, MASK_TOKEN_ID

ANNEAL_RATIO = 0.5  # halfway between causal and bidirectional


def hf_config(args: argparse.Namespace) -> dict:
    config = dict(HF_CONFIGS[args.model])
    if config["model_type"] == "gpt2":
        config |= {"embd_pdrop": args.dropout, "attn_pdrop": args.dropout, "resid_pdrop": args.dropout}
    if args.layers:
        config["n_layer" if config["model_type"] == "gpt2" else "num_hidden_layers"] = args.layers
    return config


def tokens_of(args: argparse.Namespace) -> np.ndarray:
    return harness.random_tokens(HF_CONFIGS[args.model]["vocab_size"], args.batch_size, args.length)


def ours(args: argparse.Namespace, annealed: bool) -> harness.TrainStep:
    import jax
    from flax import nnx

    from dlm_jax.checkpoints import config_from_hf
    from dlm_jax.diffusion import ObjectiveConfig
    from dlm_jax.matmul import choose_matmul
    from dlm_jax.models import Compute, LoRAConfig, Transformer, split_trainable
    from dlm_jax.training.optimizer import OptimizerConfig
    from dlm_jax.training.state import Frozen

    compute = Compute(args.dtype, args.remat, args.attention,
                      matmul=choose_matmul(args.dtype, jax.default_backend(), 1))
    lora = LoRAConfig(args.lora, 2.0 * args.lora, frozen_dtype=args.dtype) if args.lora else None
    graphdef, params, frozen = split_trainable(nnx.jit(lambda: Transformer(
        config_from_hf(hf_config(args)), rngs=nnx.Rngs(0), param_dtype=args.param_dtype, compute=compute, lora=lora))())
    # Half of 10^6 steps gone: the ratio of the annealed variant stays where it is.
    objective = ObjectiveConfig(anneal_steps=2_000_000 if annealed else 0)
    optimizer = OptimizerConfig(learning_rate=1e-4, schedule="constant", warmup_steps=0, weight_decay=0.01)
    return harness.TrainStep(graphdef, params, tokens_of(args), objective, optimizer, frozen=Frozen(frozen),
                             mask_token_id=MASK_TOKEN_ID, start=1_000_000, matmul=compute.matmul)


def pytorch(args: argparse.Namespace, annealed: bool) -> Callable[[int], None]:
    """Returns the same step as the reference implementation runs it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = hf_config(args)
    config = AutoConfig.for_model(config.pop("model_type"), **config)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="sdpa",
        dtype=getattr(torch, args.dtype if args.lora else args.param_dtype)).to(device).train()
    if args.lora:  # PEFT keeps the factors in float32
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=args.lora, lora_alpha=2 * args.lora, target_modules="all-linear"))
    if args.remat != "none":
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.01)
    tokens = torch.from_numpy(tokens_of(args)).long().to(device)
    length = args.length
    mixed = args.dtype != args.param_dtype
    autocast = torch.autocast(device, getattr(torch, args.dtype)) if mixed else contextlib.nullcontext()

    def run(_: int) -> None:
        with torch.no_grad():
            t = 1e-3 + (1 - 1e-3) * torch.rand(tokens.shape[0], 1, device=device)
            masked = torch.rand(tokens.shape, device=device) < t
            masked[:, 0] = False
            noised = torch.where(masked, MASK_TOKEN_ID, tokens)
            allowed = torch.ones(length, length, dtype=torch.bool, device=device)
            if annealed:
                allowed = allowed.tril() | (torch.rand(length, length, device=device) < ANNEAL_RATIO)
            bias = torch.where(allowed, 0.0, torch.finfo(torch.float32).min).to(getattr(torch, args.dtype))
            bias = bias.expand(tokens.shape[0], 1, length, length)
        with autocast:
            logits = model(input_ids=noised, attention_mask=bias, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]).float(),
                                                 tokens[:, 1:].reshape(-1), reduction="none")
        loss = (loss.view(tokens.shape[0], -1) * masked[:, 1:] / t).sum() / (tokens.shape[0] * (length - 1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def main() -> None:
    parser = harness.parser(__doc__, layers=0, batch_size=2, length=512, dropout=0.1, steps=20, threads=2, lora=0)
    parser.add_argument("--model", choices=HF_CONFIGS, default="gpt2-small")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--param_dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--remat", default="none", choices=("none", "dots", "full"))
    parser.add_argument("--attention", default="auto", help="our backend")
    parser.add_argument("--only", choices=("ours", "pytorch"), help="run only this side")
    parser.add_argument("--annealed", choices=("both", "off", "on"), default="both")
    parser.add_argument("--profile", metavar="DIR", help="trace our steps into DIR and print where their time goes, "
                        "instead of the comparison")
    args = parser.parse_args()
    if args.profile:
        from step_profile import profile

        run = ours(args, args.annealed == "on")
        harness.time_in_turns({"ours": run}, 0, warmup=2)
        return profile(lambda: run(2), run.program(), args.profile)

    import jax

    from dlm_jax.checkpoints import config_from_hf
    from dlm_jax.training.flops import peak_flops, train_flops

    results = []
    for annealed in {"both": (False, True), "off": (False,), "on": (True,)}[args.annealed]:
        contenders = {name: make(args, annealed) for name, make in (("ours", ours), ("pytorch", pytorch))
                      if args.only in (None, name)}
        for name, seconds in harness.time_in_turns(contenders, args.steps, warmup=2).items():
            median = statistics.median(seconds)
            results.append({"side": name, "annealed": annealed, "seconds_per_step": median,
                            "tokens_per_second": args.batch_size * args.length / median, "seconds": seconds})
    tokens = args.batch_size * args.length
    flops = train_flops(config_from_hf(hf_config(args)), tokens, tokens, args.length)
    peak = peak_flops(jax.devices()[0])
    print(f"{args.model}, {args.batch_size} x {args.length}, {args.dtype}, dropout {args.dropout}, {jax.devices()[0]}; "
          f"{args.steps} steps, median")
    print("| attention | side | seconds a step | tokens a second | of PyTorch |" + (" MFU |" if peak else ""))
    print("| --- | --- | --- | --- | --- |" + (" --- |" if peak else ""))
    for row in results:
        other = [r for r in results if r["side"] == "pytorch" and r["annealed"] == row["annealed"]]
        row["ratio"] = row["tokens_per_second"] / other[0]["tokens_per_second"] if other else None
        row["mfu"] = flops / row["seconds_per_step"] / peak if peak else None
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        kind = "annealed" if row["annealed"] else "bidirectional"
        print(f"| {kind} | {row['side']} | {row['seconds_per_step']:.3f} | "
              f"{row['tokens_per_second']:,.0f} | {ratio} |"
              + (f" {row['mfu']:.1%} |" if peak else ""))
    harness.write_results(f"train_step-{args.model}-{harness.device_name()}-{args.dtype}-dropout{args.dropout:g}"
                          + (f"-lora{args.lora}" if args.lora else ""),
                          {"settings": vars(args), "results": results}, "jax", "flax", "torch", "transformers")


if __name__ == "__main__":
    main()
