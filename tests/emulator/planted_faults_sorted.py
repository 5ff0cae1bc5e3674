"""Faults of the sorted backward, which each turn a check of test_planted_faults.py red."""

from tests.helpers.faults import Fault, without

ADDS_SECOND = "const bool adds_second = (pairs >> index[u] & 1) && at + 1 >= group_begin && at + 1 < group_end;"

BUCKET_SORT = {
    "pair across two buckets in the segment of the first": Fault(
        "bucket_sort", "+ 1 + (found.pair && found.pixel == config::bucket_size - 1)", "+ 1"
    ),
    "no pair from before the slab": Fault(
        "bucket_sort",
        "const bool enters_slab = pixel == -1 && found.pair;",
        "const bool enters_slab = false;",
    ),
    "lower neighbours for the upper ones": Fault("bucket_sort", ">> 2 * lower & 3", ">> 2 * (1 - lower) & 3"),
    "rank among all lanes, not among those of the segment": Fault(
        "bucket_sort", "__popc(peers & ((1u << lane) - 1));", "lane;"
    ),
    "missing barrier before the histograms are scanned": without(
        "bucket_sort", "    __syncthreads();\n\n    const unsigned all = scan_histograms", "    __syncthreads();\n"
    ),
    "missing barrier before the sorted run takes the place of the histograms": without(
        "bucket_sort", "__syncthreads();    // the sorted run takes the place of the histograms", "__syncthreads();"
    ),
    "missing barrier before the sorted run is copied": without(
        "bucket_sort", "    __syncthreads();\n    contributions +=", "    __syncthreads();\n"
    ),
}

SPLIT_BUCKETS = {
    "no chunk for the rest of a bucket": Fault(
        "split_buckets",
        "(unsigned)((total + contributions_per_chunk - 1) / contributions_per_chunk)",
        "(unsigned)(total / contributions_per_chunk)",
    ),
}

BLOCK_REDUCE = {
    "contribution to the pixel before the bucket taken for one inside": Fault(
        "block_reduce", "i < shared.inside[owner] ? 0 :", "false ? 0 :"
    ),
    "second pixel of a pair left out": Fault(
        "block_reduce", "collect_partial_sums(shared, pixel, 1, share, lane, sum[owned]);", ""
    ),
    "missing barrier before the partial sums are collected": without(
        "block_reduce", "share, idle);\n                __syncthreads();", "\n                __syncthreads();"
    ),
    "last partial sum of a group not stored": Fault(
        "block_reduce", "if (key >= 0) store_partial_sums(shared, key + group, lane, first, second);\n}", "}"
    ),
    "write to a pixel of the next bucket": Fault("block_reduce", "pixel >= bucket.pixels || idle", "idle"),
    "each chunk from the bucket's first contribution on": Fault(
        "block_reduce", "if (!whole && shared.from > before)", "if (false)"
    ),
    "sums of the first chunk alone": Fault("block_reduce", "chunk < chunks; ++chunk", "chunk < 1; ++chunk"),
    "missing barrier before a block knows whether its chunk is the last": without(
        "block_reduce", "chunk.chunks - 1;\n        __syncthreads();", "\n        __syncthreads();"
    ),
}

WARP_REDUCE = {
    "contributions of the first run alone": Fault(
        "warp_reduce", "if (__shfl_sync(0xffffffffu, end, owner + step - 1) <= i) owner += step;", ";"
    ),
    "second pixel that another group owns": Fault(
        "warp_reduce", ADDS_SECOND, ADDS_SECOND.replace(" && at + 1 < group_end", "")
    ),
    "sum of crowded contributions added by every group": Fault("warp_reduce", "if (group == 0) {", "{"),
}

SORTED = BUCKET_SORT | SPLIT_BUCKETS | BLOCK_REDUCE | WARP_REDUCE
