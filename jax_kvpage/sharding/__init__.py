"""Pools over a mesh: one arena a device, one host decision for all of them."""
