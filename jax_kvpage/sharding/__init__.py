"""Pools over a mesh: one arena per device, one host decision for all of them."""
