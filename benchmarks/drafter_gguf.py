"""Random drafters as GGUF files in llama.cpp: its logits for a block beside this library's.

    python benchmarks/drafter_gguf.py --model=smollm2.gguf --llama_cpp=PYTHON

PYTHON is an interpreter that has llama-cpp-python. A DFlash, a DSpark and a DFlash2 drafter of the target in the GGUF
file guess a block after 20 tokens, from the features that this library computes. Where the target is quantized,
llama.cpp rounds the activations that its head multiplies. Prints a table, and writes
benchmarks/results/drafter_gguf-NAME.json.
"""

import dataclasses
import pathlib
import subprocess
import tempfile

import harness
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dlm_jax.attention import AttentionMask
from dlm_jax.checkpoints import load_pretrained
from dlm_jax.checkpoints.drafter_gguf import save_drafter_gguf
from dlm_jax.models import DraftedModel, Drafter, DrafterConfig

ANCHOR, BLOCK = 20, 6
KINDS = {
    "dflash": dict(sample_from_anchor=False),
    "dspark": dict(sample_from_anchor=True, markov_rank=16, confidence_head=True),
    "dflash2": dict(sample_from_anchor=False, conv_kernel_size=2, selector_rank=16, selector_top_k=8,
                    sliding_layers=(0, 1), sliding_causal=False),
}
# Reads the features before the anchor, then runs the block. Special buffers for matrices (AMX) are off: where a kernel
# does not allow them, llama.cpp dies.
RUN = """
import ctypes, sys
import llama_cpp as L, numpy as np

target_path, drafter_path, arrays = sys.argv[1:4]
given = np.load(arrays)
L.llama_backend_init()
options = L.llama_model_default_params()
options.use_extra_bufts = False
target = L.llama_model_load_from_file(target_path.encode(), options)
drafter = L.llama_model_load_from_file(drafter_path.encode(), options)
settings = L.llama_context_default_params()
settings.n_ctx = settings.n_batch = settings.n_ubatch = 256
settings.type_k = settings.type_v = 0  # float32
settings.flash_attn_type = 0  # it rounds to float16
settings.n_threads = settings.n_threads_batch = 1
settings.ctx_other = L.llama_init_from_model(target, settings)
context = L.llama_init_from_model(drafter, settings)
L.llama_set_causal_attn(context, False)


def run(tokens=None, features=None, first=0):
    rows = len(features if tokens is None else tokens)
    batch = L.llama_batch_init(rows, 0 if features is None else features.shape[1], 1)
    batch.n_tokens = rows
    for i in range(rows):
        batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = first + i, 1, 0, tokens is not None
        if tokens is not None:
            batch.token[i] = int(tokens[i])
    if features is not None:
        ctypes.memmove(batch.embd, features.ctypes.data, features.nbytes)
    assert L.llama_decode(context, batch) == 0


run(features=np.ascontiguousarray(given["features"], np.float32))
run(tokens=given["block"], first=len(given["features"]))
size = len(given["block"]), L.llama_vocab_n_tokens(L.llama_model_get_vocab(drafter))
np.save(sys.argv[4], np.ctypeslib.as_array(L.llama_get_logits(context), size))
"""


@jax.jit
def block_logits(model: DraftedModel, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the features, [length, taps * embed], and the logits of the guesses, along the greedy ones."""
    drafter, anchor = model.drafter, jnp.array([[ANCHOR]])
    features = model.target.hidden_and_features(tokens, AttentionMask.causal(), drafter.config.target_layer_ids)[1]
    embeddings = model.block_embeddings(tokens[:, ANCHOR : ANCHOR + 1])
    hidden = drafter.hidden(drafter.fuse(features), embeddings, anchor)[:, drafter.config.first_slot :]
    logits, previous, state = model.target.unembed(hidden), tokens[:, ANCHOR], drafter.markov_state((1,))
    rows = []
    for slot in range(logits.shape[1]):
        row = logits[:, slot]
        if drafter.markov is not None:
            bias, state = drafter.markov_bias(previous, hidden[:, slot], state)
            row += bias
        previous = row.argmax(-1)
        rows.append(row[0])
    return features[0], jnp.stack(rows)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--model", required=True, type=pathlib.Path, help="the target: a GGUF file")
    parser.add_argument("--llama_cpp", required=True, metavar="PYTHON")
    arguments = parser.parse_args()
    pretrained = load_pretrained(arguments.model)
    target = pretrained.model.config
    tokens = np.random.default_rng(0).integers(3, target.vocab_size, (1, ANCHOR + 4))
    ids = tuple(np.linspace(1, target.num_layers - 3, 3).astype(int).tolist())
    layers = dataclasses.replace(target, family="qwen3", num_layers=2, qk_norm=True, sliding_window=12)
    results = {}
    print(harness.table_head("drafter", "largest logit", "largest difference", "greedy guesses"))
    for kind, settings in KINDS.items():
        config = DrafterConfig(layers, target_layer_ids=ids, block_size=BLOCK, mask_token_id=5, **settings)

        @jax.jit
        def make(config: DrafterConfig = config) -> Drafter:
            drafter = Drafter(config, rngs=nnx.Rngs(1))
            nnx.update(drafter, jax.tree.map(
                lambda x: x + 0.02 * jax.random.normal(jax.random.key(x.size), x.shape), nnx.state(drafter)))
            return drafter

        drafter = make()
        features, ours = block_logits(DraftedModel(pretrained.model, drafter), jnp.asarray(tokens))
        with tempfile.TemporaryDirectory() as folder:
            place, block = pathlib.Path(folder), np.full(BLOCK, config.mask_token_id)
            block[0] = tokens[0, ANCHOR]
            save_drafter_gguf(place / "drafter.gguf", drafter, pretrained)
            np.savez(place / "given.npz", features=np.asarray(features)[:ANCHOR], block=block)
            subprocess.run([arguments.llama_cpp, "-c", RUN, arguments.model, *(place / name for name in (
                "drafter.gguf", "given.npz", "logits.npy"))], check=True, stderr=subprocess.DEVNULL)
            theirs = np.load(place / "logits.npy")[config.first_slot :]
        equal = bool((theirs.argmax(-1) == ours.argmax(-1)).all())
        results[kind] = {"largest_logit": float(np.abs(ours).max()),
                         "largest_difference": float(np.abs(theirs - ours).max()), "greedy_guesses_equal": equal}
        largest, difference, _ = results[kind].values()
        print(harness.row(kind, f"{largest:.1f}", f"{difference:.1e}", "equal" if equal else "different"))
    harness.write_results(f"drafter_gguf-{arguments.model.stem}", results)


if __name__ == "__main__":
    main()
