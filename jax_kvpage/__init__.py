"""jax_kvpage: a paged KV cache for JAX that uses the hardware's page table."""

from jax_kvpage import _targets as _targets
from jax_kvpage._version import VERSION as __version__
from jax_kvpage.cache import Batch, KVCache
from jax_kvpage.errors import DeviceFault, KVPageError, OutOfBlocks, OutOfSlots, PoolClosed
from jax_kvpage.handover import Handover
from jax_kvpage.host_store import HostStore
from jax_kvpage.ops.advance import advance
from jax_kvpage.ops.after import after
from jax_kvpage.ops.append_kv import append_kv
from jax_kvpage.ops.grow import grow
from jax_kvpage.ops.map_slots import map_slots
from jax_kvpage.ops.paged_attention import paged_attention
from jax_kvpage.ops.positions import positions
from jax_kvpage.ops.read_kv import read_kv
from jax_kvpage.ops.read_views import read_views
from jax_kvpage.ops.set_lengths import set_lengths
from jax_kvpage.ops.update_and_attend import update_and_attend
from jax_kvpage.ops.with_tables import paged_attention_with_tables
from jax_kvpage.pool import KVPool
from jax_kvpage.sharding.spreading import Spread, spread
from jax_kvpage.spec import CacheSpec
from jax_kvpage.stats import MemoryRange, PoolStats
from jax_kvpage.store import BlockStore
from jax_kvpage.swapping import Swapped
from jax_kvpage.tickets import Ticket

__all__ = [
    "Batch",
    "BlockStore",
    "CacheSpec",
    "DeviceFault",
    "Handover",
    "HostStore",
    "KVCache",
    "KVPageError",
    "KVPool",
    "MemoryRange",
    "OutOfBlocks",
    "OutOfSlots",
    "PoolClosed",
    "PoolStats",
    "Spread",
    "Swapped",
    "Ticket",
    "__version__",
    "advance",
    "after",
    "append_kv",
    "grow",
    "map_slots",
    "paged_attention",
    "paged_attention_with_tables",
    "positions",
    "read_kv",
    "read_views",
    "set_lengths",
    "spread",
    "update_and_attend",
]
