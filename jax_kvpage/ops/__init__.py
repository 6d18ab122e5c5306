"""The cache operations that programs use, one file per primitive."""
