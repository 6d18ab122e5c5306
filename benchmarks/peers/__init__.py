"""The measured systems, one file and one process (`worker.py`) each."""

NAMES: dict[str, str] = {
    "kvpage": "jax_kvpage",
    "jax_gather": "JAX gather (block table + take)",
    "jax_static": "JAX dot_product_attention, static",
    "torch_sdpa": "torch SDPA",
    "ort_gqa": "onnxruntime GroupQueryAttention",
    "openvino_pa": "OpenVINO PagedAttention",
    "vllm_cpu": "vLLM CPU",
}
