"""The systems measured on a GPU, one file and one process each."""

NAMES: dict[str, str] = {
    "kvpage": "jax_kvpage",
    "torch_sdpa": "torch SDPA",
    "torch_varlen": "torch varlen_attn",
    "jax_dense": "JAX dot_product_attention",
    "jax_cudnn_paged": "cuDNN paged attention (JAX)",
    "pallas_paged": "Pallas paged_attention (GPU)",
}
