"""The programs of `--scan` over several devices (`--mesh tp=N`); they map their own blocks."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_kvpage

from .mesh import sharded_step
from .model import Llama
from .programs import Programs
from .sampling import Sampling

__all__ = ["ShardedPrograms"]


class ShardedPrograms(Programs):
    """Compiled programs of a model that is split over a mesh.

    Args:
      model: The model; it is modified, and must not be used afterwards.
      mesh: From `make_mesh`.
      sampling: How tokens are chosen, the same on all devices.
      stop_ids: Token ids that end a sequence.
      implementation: As for `jax_kvpage.update_and_attend`.
    """

    def __init__(
        self,
        model: Llama,
        mesh: Mesh,
        sampling: Sampling,
        stop_ids: tuple[int, ...],
        implementation: str | None = None,
    ) -> None:
        super().__init__(model, sampling, stop_ids, implementation)
        self._on_mesh, self._weights = sharded_step(model, mesh, implementation)
        self._everywhere = NamedSharding(mesh, P())

    def _call(self, function: Callable[..., Any], static: tuple[int, ...], *args: Any) -> Any:
        cache, *others = args
        return super()._call(function, static, cache, *jax.device_put(others, self._everywhere))

    def _logits(
        self,
        weights: list[jax.Array],
        cache: jax_kvpage.KVCache,
        tokens: jax.Array,
        batch: jax_kvpage.Batch,
        rows: jax.Array,
    ) -> tuple[jax.Array, jax_kvpage.KVCache]:
        del rows  # `sharded_step` uses batch.last_rows
        return self._on_mesh(weights, cache, tokens, batch)
