"""Trains the small Llama in examples/tiny_llama on text that every Python installation has.

    python examples/train_tiny_llama.py --out tiny

Tokenizer (byte-level BPE), model and held-out loss all come from the corpus of llama/corpus.py; a
run is reproducible for a given Python version. It takes less than an hour on one core of a desktop
machine.
"""

import argparse
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from llama import corpus
from llama.checkpoint import load_model, save_model
from llama.config import LlamaConfig
from llama.model import Llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

_BEGIN, _END = "<s>", "</s>"


def train_tokenizer(documents: list[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE tokenizer that adds `<s>` before a text; `</s>` ends a document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_BEGIN, _END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_BEGIN} $A", special_tokens=[(_BEGIN, tokenizer.token_to_id(_BEGIN))]
    )
    return tokenizer


def token_stream(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """Concatenates all documents, each between `<s>` and `</s>`: int32 `[tokens]`."""
    end = tokenizer.token_to_id(_END)
    encoded = tokenizer.encode_batch(documents)
    return np.concatenate([np.array([*item.ids, end], np.int32) for item in encoded])


def tiny_config(tokenizer: Tokenizer, context: int) -> LlamaConfig:
    """A model of two million parameters, a fifth of them in the embedding."""
    begin_id, end_id = (tokenizer.encode(text).ids[-1] for text in (_BEGIN, _END))
    return LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        rms_norm_eps=1e-5,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=begin_id,
        eos_token_ids=(end_id,),
    )


def next_token_loss(model: Llama, rows: jax.Array) -> jax.Array:
    """Mean cross entropy, in nats, of predicting the tokens of rows `[B, T + 1]` from the tokens
    before them.
    """
    logits = model.dense(rows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()


def held_out_loss(model: Llama, stream: np.ndarray, context: int, batch: int) -> float:
    """Mean loss over a token stream split into windows of `context`; an incomplete last batch is
    left out.
    """
    evaluate = nnx.jit(next_token_loss)
    starts = np.arange(0, len(stream) - context - 1, context)
    rows = stream[starts[:, None] + np.arange(context + 1)]
    rows = rows[: len(rows) // batch * batch].reshape(-1, batch, context + 1)
    return float(np.mean([evaluate(model, jnp.asarray(part)) for part in rows]))


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="directory to write")
    parser.add_argument(
        "--init", type=pathlib.Path, help="go on from the weights of this directory"
    )
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument(
        "--batch", type=int, default=4, help="windows of --context tokens in a step"
    )
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--save-every", type=int, default=250, help="steps between saves and held-out losses"
    )
    args = parser.parse_args()

    documents = corpus.build()
    training = [text for text in documents if not corpus.is_held_out(text)]
    held_out = [text for text in documents if corpus.is_held_out(text)]
    if args.init:
        tokenizer = Tokenizer.from_file(str(args.init / "tokenizer.json"))
        model = load_model(args.init, dtype=jnp.dtype(jnp.float32))
    else:
        tokenizer = train_tokenizer(training, args.vocab_size)
        model = Llama(tiny_config(tokenizer, args.context), rngs=nnx.Rngs(args.seed))
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(args.out / "tokenizer.json"))
    stream, held_stream = token_stream(tokenizer, training), token_stream(tokenizer, held_out)
    print(f"training: {len(training)} documents, {len(stream)} tokens")
    print(f"held out: {len(held_out)} documents, {len(held_stream)} tokens")
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    print(f"{count} parameters")

    peak, warmup = args.learning_rate, min(100, args.steps // 4)
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, args.steps, 0.05 * peak)

    def decayed(params: nnx.State) -> nnx.State:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    adamw = optax.adamw(rate, b2=0.95, weight_decay=args.weight_decay, mask=decayed)
    optimizer = nnx.Optimizer(
        model, optax.chain(optax.clip_by_global_norm(1.0), adamw), wrt=nnx.Param
    )

    @nnx.jit
    def train_step(model: Llama, optimizer: nnx.Optimizer, rows: jax.Array) -> jax.Array:
        loss, gradients = nnx.value_and_grad(next_token_loss)(model, rows)
        optimizer.update(model, gradients)
        return loss

    random = np.random.default_rng(args.seed)
    begin = time.monotonic()
    losses = []
    for step in range(1, args.steps + 1):
        # Attention over long windows is most of the cost, so only the last quarter of the steps
        # uses them.
        half = 1 + (step <= args.steps * 3 // 4)
        context, windows = args.context // half, args.batch * half
        starts = random.integers(0, len(stream) - context, windows)
        rows = stream[starts[:, None] + np.arange(context + 1)]
        losses.append(float(train_step(model, optimizer, jnp.asarray(rows))))
        if step % args.save_every == 0 or step == args.steps:
            report = {
                "step": step,
                "training_loss": round(float(np.mean(losses[-args.save_every :])), 4),
                "held_out_loss": round(
                    held_out_loss(model, held_stream, args.context, args.batch), 4
                ),
                "seconds": round(time.monotonic() - begin),
            }
            print(json.dumps(report), flush=True)
            save_model(model, args.out)


if __name__ == "__main__":
    main()
