"""A Llama in Flax nnx that serves from a jax_kvpage cache: model, checkpoint, tokenizer, sampling,
engine, report.
"""
