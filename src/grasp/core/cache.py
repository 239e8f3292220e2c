"""The key-value cache of a model: one that grows, one of fixed size for compiled graphs, or one
that forgets nothing for exported ones.
"""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from grasp.core.decoder import Decoder


def new_cache(decoder: Decoder, fixed_length: int | None = None) -> Any:
    """An empty cache: growing with the text as in `generate()`, or with room for `fixed_length`
    tokens from the start.
    """
    if fixed_length is None:
        return DynamicCache(config=decoder.config)
    return StaticCache(config=decoder.config, max_cache_len=fixed_length)


def full_cache() -> Any:
    """An empty cache that keeps every token, also where a layer looks back over a window only (its
    mask then applies the window).
    """
    return DynamicCache()


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values that a decode step reads."""
    tensors = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def holds_tokens_alone(cache: Any) -> bool:
    """Whether an empty cache of `new_cache` will hold keys and values of tokens and nothing else:
    not so with linear attention or Mamba, and not known of classes of a model's own.
    """
    kinds = {type(layer) for layer in cache.layers}
    return bool(kinds) and kinds <= {DynamicLayer, DynamicSlidingWindowLayer}
