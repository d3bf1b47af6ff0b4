"""A trained drafter in llama.cpp's speculative decoding: its greedy text and accepted drafts beside this library's.

    python benchmarks/drafter_decoding.py --model=smollm2-f32.gguf --drafter=runs/drafter --data_dir=DIR \\
        --binary=llama-speculative-simple

The binary is an example of llama.cpp, whose source is in the source package of llama-cpp-python. The target is a GGUF
file, in float32 if texts are to be equal: llama.cpp rounds the activations that a quantized matrix multiplies. The
drafter is a run or a directory, which is written as a GGUF file for llama.cpp. DIR has what benchmarks/speculative.py
reads. Both sides begin with the token of position 0, and write at temperature 0 in float32.

llama.cpp writes a few tokens past the limit, and counts the drafts accepted there, which this library does not.
Prints a table, and writes benchmarks/results/drafter_decoding.json.
"""

import pathlib
import re
import subprocess
import tempfile

import harness
from speculative import read_prompts

from dlm_jax import DiffusionLM
from dlm_jax.checkpoints import open_drafter
from dlm_jax.checkpoints.drafter_gguf import save_drafter_gguf
from dlm_jax.sampling import SamplingStats


def llama_cpp(binary: str, model: pathlib.Path, drafter: pathlib.Path, prompt: str, new_tokens: int, kind: str,
              num_drafts: int) -> tuple[str, int, int]:
    """Returns the text after the prompt, how many drafts were made, and how many accepted."""
    float32 = [f"--cache-type-{name}" for name in ("k", "v", "k-draft", "v-draft")]
    command = [binary, "-m", model, "-md", drafter, "--spec-type", f"draft-{kind}", "--spec-draft-n-max",
               str(num_drafts), "-n", str(new_tokens - 1), "--temp", "0", "-c", "1024", "-fa", "off", "--no-escape",
               *[word for flag in float32 for word in (flag, "f32")], "-p", prompt]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    drafted, accepted = (int(re.search(rf"n_{name} *= (\d+)", done.stdout + done.stderr)[1])
                         for name in ("drafted", "accept"))
    return done.stdout.split(prompt, 1)[1].strip(), drafted, accepted


def main() -> None:
    parser = harness.parser(__doc__, prompts=8, new_tokens=64)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="the target: a GGUF file")
    parser.add_argument("--drafter", required=True, help="a run or a directory")
    parser.add_argument("--data_dir", type=pathlib.Path, required=True)
    parser.add_argument("--binary", required=True, help="llama-speculative-simple")
    args = parser.parse_args()
    lm = DiffusionLM.from_pretrained(args.model)
    drafter = open_drafter(args.drafter, target=lm.pretrained.model).drafter
    kind, number = "dspark" if drafter.config.sample_from_anchor else "dflash", drafter.config.num_drafts
    start = lm.tokenizer.convert_ids_to_tokens(lm.pretrained.start_token_id)
    results = {}
    print(harness.table_head("prompts", "equal texts", "accepted", "accepted in llama.cpp", "tokens per pass"))
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "drafter.gguf"
        save_drafter_gguf(file, drafter, lm.pretrained)
        for name, prompts in read_prompts(args.data_dir, args.prompts).items():
            stats, equal, drafted, accepted = SamplingStats(), 0, 0, 0
            for prompt in prompts:
                text, *counts = llama_cpp(args.binary, args.model, file, start + prompt, args.new_tokens, kind, number)
                ours, = lm.generate(prompt, args.new_tokens, policy="autoregressive", temperature=0.0,
                                    drafter=args.drafter, stats=stats)
                ours = ours[len(prompt) :].strip()
                equal += text.startswith(ours) and bool(ours) == bool(text)
                drafted, accepted = drafted + counts[0], accepted + counts[1]
            share = sum(stats.accepted) / (stats.passes * number)
            results[name] = {"texts": len(prompts), "equal_texts": equal, "acceptance": share,
                             "llama_cpp_acceptance": accepted / drafted, "tokens_per_pass": stats.tokens_per_pass}
            print(harness.row(name, f"{equal} of {len(prompts)}", f"{share:.3f}", f"{accepted / drafted:.3f}",
                              f"{stats.tokens_per_pass:.2f}"), flush=True)
    harness.write_results("drafter_decoding", {"settings": harness.settings(args), "results": results}, "jax", "gguf")


if __name__ == "__main__":
    main()
