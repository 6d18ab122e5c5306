"""The installed version of this package."""

import importlib.metadata

__all__ = ["VERSION"]

try:
    VERSION = importlib.metadata.version("jax_kvpage")
except importlib.metadata.PackageNotFoundError:  # imported from a build folder
    VERSION = "0+uninstalled"
