"""The version of this package, as it was installed."""

import importlib.metadata

__all__ = ["VERSION"]

try:
    VERSION = importlib.metadata.version("jax_kvpage")
except importlib.metadata.PackageNotFoundError:  # a build folder on the path
    VERSION = "0+uninstalled"
