// Between the passes of the sum without atomics by a block a bin: finds the bins of very many parts, and lists their
// pieces, so that no block is left with a bin alone (all samples on one pixel, or a coarse level).
//
// A lane a bin; the warps of a block share the runs. The order of the list depends on which block comes first; what
// each piece holds, and the order in which pieces are added up, do not.

extern "C" __global__ void MSDA_BOUNDS msda_count(
        const unsigned short* __restrict__ starts, msda_counts* __restrict__ counts, msda_piece* __restrict__ pieces,
        long long runs, long long rows, long long piece) {
    MSDA_SHARED_MEMORY(msda_memory);
    msda_address(*of_warps)[32] = reinterpret_cast<msda_address(*)[32]>(msda_memory);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned bins = (unsigned)(rows / MSDA_ROWS), blocks = (bins + 31) / 32;
    const unsigned head_here = blockIdx.x / blocks, number = blockIdx.x % blocks * 32 + lane;
    const int pitch = msda_pitch_of((int)bins);
    starts += head_here * runs * pitch + 2 * number;
    msda_address total = 0;
#pragma unroll 4
    for (long long run = warp; run < runs; run += MSDA_WARPS)
        if (number < bins) total += msda_stretch_at(starts + run * pitch).count();
    of_warps[warp][lane] = total;
    __syncthreads();
    if (warp != 0 || number >= bins) return;
#pragma unroll
    for (int w = 1; w < MSDA_WARPS; ++w) total += of_warps[w][lane];

    const unsigned bin = head_here * bins + number;
    const unsigned of_bin = total > (msda_address)piece ? (unsigned)((total + piece - 1) / piece) : 1;
    counts->of_bin[bin].pieces = of_bin;
    counts->of_bin[bin].done = 0;
    if (of_bin == 1) return;
    const unsigned first = atomicAdd(&counts->pieces, of_bin);
    for (unsigned i = 0; i < of_bin; ++i) {
        msda_piece one = {bin, i, of_bin, first};
        pieces[first + i] = one;
    }
}
