"""Faults of the forward kernel, which each turn a check of test_planted_faults.py red."""

from tests.helpers.faults import Fault, without

PREPARE = "else prepare_samples(samples, queries, raw, 0, k0);\n                __syncwarp();"
PREPARE_BY_QUERY = "prepare_query_samples(samples, pair, levels, raw_of_query, lane);\n                __syncwarp();"
END_OF_CHUNK = "            __syncwarp();\n        }\n\n        sum_over_lane_groups(sum);"
FIRST_QUERY = "const int first = (tile * config::warps + threadIdx.x / 32) * queries_per_tile;"
SUM = "sum[tile][v] = fma(weight[c], x[v], sum[tile][v]);"
FLOAT16_SUM = "{ float16 half; narrow(fma(weight[c], x[v], sum[tile][v]), half); sum[tile][v] = widen(half); }"


def forward(text, replacement):
    return Fault("forward", text, replacement)


# ---- barriers

BARRIERS = {
    "missing barrier after the samples are prepared": without("forward", PREPARE),
    "missing barrier after a query's lanes have prepared its samples": without("forward", PREPARE_BY_QUERY),
    "missing barrier before the next chunk of samples": without("forward", END_OF_CHUNK),
    "missing barrier before the next query tile": forward(
        END_OF_CHUNK, END_OF_CHUNK.replace("__syncwarp();", "if (config::query_tiles == 1) __syncwarp();")
    ),
    "missing barrier after a warp has read the levels": without(
        "forward", "__syncwarp();\n    return queries_are_pixels;"
    ),
    "barrier that some lanes do not reach": forward(
        PREPARE, PREPARE.replace("__syncwarp();", "if (active) __syncwarp();")
    ),
}

# ---- which queries, heads and samples

ASSIGNMENT = {
    "queries of another warp": forward(
        FIRST_QUERY, FIRST_QUERY.replace("threadIdx.x / 32", "(loads_by_query ? threadIdx.x / 32 : 0)")
    ),
    "queries of another warp, where lanes load the samples of their query": forward(
        FIRST_QUERY, FIRST_QUERY.replace("threadIdx.x / 32", "(loads_by_query ? 0 : threadIdx.x / 32)")
    ),
    "one query for all lanes": forward("tile, (int)(threadIdx.x % 32), lengths", "tile, 0, lengths"),
    "queries of the tile before": forward("tile + 1, local, lengths", "tile, local, lengths"),
    "no check for the last query": forward("work.first + at < Q ? query_in_order", "true ? query_in_order"),
    "division that rounds up": forward("((float)x + 0.5f)", "((float)x + 1.5f)"),
    "lanes beyond the last query that write samples": forward("pair >= pairs_per_tile) return;", "pair >= 99) return;"),
    "samples that other lanes of the query load": forward(
        "const int k = i * config::lanes + lane;\n        raw.xy",
        "const int k = lane * loads_per_lane + i;\n        raw.xy",
    ),
    "level of the sample before": forward("levels.at(MSDA_LEVEL_OF(k)));", "levels.at(MSDA_LEVEL_OF(k - (k > 0))));"),
    "samples of a query that does not exist": forward(
        "if (q >= 0 && k < K) {\n            const index_t at", "if (k < K) {\n            const index_t at"
    ),
    "weights of the first head, where lanes load the samples of their query": forward(
        "raw.attention[i] = load_streaming<1>(weights, at);",
        "raw.attention[i] = load_streaming<1>(weights, at - head * K);",
    ),
    "weights of the first head of a warp for its second": forward(
        "load_streaming<1>(weights, element_in_image(q, head * weights_pitch + k, weights_pitch))",
        "load_streaming<1>(weights, element_in_image(q, k, weights_pitch))",
    ),
    "value of the first head of a warp for its second": forward(
        "(work.m + head) * head_stride", "work.m * head_stride"
    ),
    "value of head 0": forward("(work.m + head) * head_stride", "head * head_stride"),
    "first query of a block of the last heads": forward(
        "row % config::query_tiles * gridDim.x + blockIdx.x", "row % config::query_tiles + blockIdx.x"
    ),
    "another one of the last heads": forward("whole + row / config::query_tiles", "whole + row % config::query_tiles"),
    "no check for the last channel": forward(
        "if (config::D % channel_tile != 0 && channel >= config::D) continue;\n        const", "const"
    ),
}

# ---- levels

LEVELS = {
    "width of the first level, in registers": forward("level.w = condition ? other.w", "level.w = 0 ? other.w"),
    "level before, in registers": forward("take_if(l == i,", "take_if(l > i,"),
    "level before for the first pixel of a level": forward("take_if(position >=", "take_if(position >"),
    "pixels in tiles though levels do not follow each other, in registers": forward(
        "queries_are_pixels = queries_are_pixels && level.start == end;", ""
    ),
    "pixels in tiles though levels do not follow each other": forward(
        "(int)extent.start == (lane ? before : 0)", "true"
    ),
    "zeros for a level that does not fit": forward(
        "if (!cell.in_bounds && level.w == 0) sample.attention = quiet_nan();", ""
    ),
}

# ---- interpolation and sums

ARITHMETIC = {
    "column beyond the level": forward("cell.x0 + 1 < level.w ? 10", "cell.x0 + 1 <= level.w ? 10"),
    "sample out of bounds that counts": forward("px > -1 && py > -1", "px > -2 && py > -1"),
    "left and right neighbour exchanged": forward(
        "weight[1] = top * sample.fraction_x;\n        weight[0] = top - weight[1];",
        "weight[0] = top * sample.fraction_x;\n        weight[1] = top - weight[0];",
    ),
    "masked neighbour with a weight": forward("if (!axis.has_first || !axis.has_second) {", "if (false) {"),
    "all weight to the masked neighbour": forward(
        "fraction = axis.has_first ? (acc_t)0 : (acc_t)1;", "fraction = axis.has_first ? (acc_t)1 : (acc_t)0;"
    ),
    "last column masked": forward("(unsigned)axis.first + 1 < (unsigned)size", "(unsigned)axis.first < (unsigned)size"),
    "masked sample with a weight": forward("sample.attention = mask ? attention", "sample.attention = 1 ? attention"),
    "value of another query for a masked neighbour": forward(
        "for (int c = 0; c < 4; ++c) loaded[c].word = decltype(loaded[c].word)();",
        "for (int c = 0; c < 4; ++c)\n"
        "    loaded[c] = load_channels((address_t)value + 3 * config::pixel_stride * sizeof(value_t));",
    ),
    "sum in float16": forward(SUM, FLOAT16_SUM),
}

# ---- memory

MEMORY = {
    "shared memory of the next warp": forward(
        "prepared_sample* samples = shared.samples[threadIdx.x / 32];",
        "prepared_sample* samples = shared.samples[threadIdx.x / 32] + pairs_per_tile * sample_pitch;",
    ),
    "vector at an address that is not aligned": forward(
        "+ lane * config::vec) * sizeof(value_t);", "+ lane * config::vec) * sizeof(value_t) + sizeof(value_t);"
    ),
}

FORWARD = BARRIERS | ASSIGNMENT | LEVELS | ARITHMETIC | MEMORY
