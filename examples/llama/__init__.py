"""A Llama model in Flax nnx that uses a jax_kvpage cache: model, checkpoint, tokenizer, sampling,
engine, report.
"""
