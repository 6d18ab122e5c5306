"""The operations on a cache that programs use, one file for each primitive."""
