"""The programs of `--scan` over several devices (`--mesh tp=N`), which map the blocks they need."""

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
    """Compiled programs of a model that is spread over a mesh.

    Args:
      model: Its weights are taken apart.
      mesh: Of `make_mesh`.
      sampling: How tokens are chosen, on every device alike.
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
        del rows  # those of the batch
        return self._on_mesh(weights, cache, tokens, batch)
