"""Schedules of the emulator: the order in which it runs the threads of a block (cuda_on_cpu.h)."""

WARP_BY_WARP = 1 << 16
UPWARDS, DOWNWARDS = 0, 1
#: Of a block. In a block of fewer warps the number of a warp is taken modulo theirs.
MOST_WARPS = 32
FEW_WARPS = 8


def first(number):
    """The rule that one warp or lane runs before all others."""
    return 2 + 2 * number


def last(number):
    """The rule that one warp or lane runs after all others."""
    return 3 + 2 * number


def warp_by_warp(warps, lanes=UPWARDS):
    """Each warp runs to its next barrier of the block before another moves, in it each lane to its next shuffle."""
    return WARP_BY_WARP + 256 * warps + lanes


IN_STEP = {"in step, upwards": 0, "in step, downwards": 1, "in step, scattered": 7}
OF_WARPS = {
    "upwards": warp_by_warp(UPWARDS),
    "downwards": warp_by_warp(DOWNWARDS, DOWNWARDS),
    **{f"warp {warp} first": warp_by_warp(first(warp)) for warp in range(MOST_WARPS)},
    **{f"warp {warp} last": warp_by_warp(last(warp)) for warp in range(MOST_WARPS)},
}
OF_LANES = {
    **{f"lane {lane} first": warp_by_warp(UPWARDS, first(lane)) for lane in range(32)},
    **{f"lane {lane} last": warp_by_warp(UPWARDS, last(lane)) for lane in range(32)},
}
SCHEDULES = IN_STEP | OF_WARPS | OF_LANES
#: The first and last lane of a warp, and lanes at which groups of 4 and of 16 lanes end or begin.
LANES = [f"lane {lane} {place}" for lane in (0, 3, 16, 31) for place in ("first", "last")]
WARPS = [f"warp {warp} {place}" for warp in range(FEW_WARPS) for place in ("first", "last")]
SOME = IN_STEP | {name: SCHEDULES[name] for name in ("upwards", "downwards", *WARPS, *LANES)}
