"""Modules of serve_openai.py. The name differs from that of `openai`, the client on PyPI."""
