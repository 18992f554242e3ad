"""What SGLang's radix cache takes for a prompt: the peer of `bench/cache.py`, run by a Python that has sglang.

    python bench/sglang_radix.py TREE_PAGES PAGES,PAGES,... REPEATS

Prints one JSON object: pages of a prompt -> median milliseconds of match + lock + insert + unlock. The tree is filled
with prompts inserted whole, so that its nodes are long; each measured prompt shares its first half with one of them.
Needs nothing of Penumbra.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from array import array
from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

PAGE = 256
LONGEST = 900_000 // PAGE


class Slots:
    """Stands for the pool the cache frees into; the bench frees nothing."""

    device = torch.device("cpu")

    def free(self, slots: torch.Tensor) -> None:
        pass


def main(tree_pages: int, lengths: list[int], repeats: int) -> dict[int, float]:
    rng = random.Random(0)

    def prompt(pages: int) -> Any:
        return array("q", rng.choices(range(100_000), k=pages * PAGE))

    cache = RadixCache.create_simulated(mock_allocator=Slots(), page_size=PAGE)
    prompts = [prompt(LONGEST) for _ in range(tree_pages // LONGEST)]
    for tokens in prompts:
        cache.insert(InsertParams(key=RadixKey(tokens), value=torch.arange(len(tokens))))
    found = {}
    for pages in lengths:
        seconds = []
        for _ in range(repeats):
            tokens = rng.choice(prompts)[: pages // 2 * PAGE] + prompt(pages - pages // 2)
            slots = torch.arange(len(tokens))
            began = time.perf_counter()
            match = cache.match_prefix(MatchPrefixParams(key=RadixKey(tokens)))
            cache.inc_lock_ref(match.last_device_node)
            cache.insert(InsertParams(key=RadixKey(tokens), value=slots))
            cache.dec_lock_ref(match.last_device_node)
            seconds.append(time.perf_counter() - began)
            held = match.device_prefix_len
            assert held == pages // 2 * PAGE, f"{held} tokens found of {pages // 2 * PAGE}"
        found[pages] = 1e3 * statistics.median(seconds)
    return found


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), [int(n) for n in sys.argv[2].split(",")], int(sys.argv[3]))))
