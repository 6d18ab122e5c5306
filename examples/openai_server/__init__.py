"""Modules of serve_openai.py; not called `openai`, which is the client package on PyPI."""
