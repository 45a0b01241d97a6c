"""The KV cache of a patched model: it knows more tokens than it stores.

* :class:`KVCache`: operations by logical index (`docs/cache.md` is the page about it);
* :class:`Segment`: the protocol of storage, with `Dense`, `Packed`, `Offloaded`, `Quantised`,
  `LowRank` and `Landmarked`;
* :class:`SlotLayer`, :class:`SlotTable`: one layer, and what its slots stand for;
* :func:`save_prefix`, :func:`load_prefix`: a cache on disk.

Events, by which the engine calls a method, are in :mod:`mllm.compressors.base`
(:class:`~mllm.compressors.base.CacheCompressor`).
"""

from mllm.cache.adoption import CacheMark, adopt, cache_bytes, note_rows
from mllm.cache.landmarks import Landmarked
from mllm.cache.layer import SlotLayer
from mllm.cache.looking import CacheView, SlotView
from mllm.cache.lowrank import Fit, LowRank
from mllm.cache.ops import KVCache, Snapshot, refuse_flash
from mllm.cache.prefix import load_prefix, save_prefix
from mllm.cache.quantised import Quantised
from mllm.cache.segments import Dense, Offloaded, Packed, Segment
from mllm.cache.slots import SlotTable

__all__ = [
    "CacheMark",
    "CacheView",
    "Dense",
    "Fit",
    "KVCache",
    "Landmarked",
    "LowRank",
    "Offloaded",
    "Packed",
    "Quantised",
    "Segment",
    "SlotLayer",
    "SlotTable",
    "SlotView",
    "Snapshot",
    "adopt",
    "cache_bytes",
    "load_prefix",
    "note_rows",
    "refuse_flash",
    "save_prefix",
]
