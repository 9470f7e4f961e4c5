// global_pool  out[b,s,c] = scale * sum over the tokens t of split s of LN(x[b,t])[c], without the LN where !NORM
// shapes       x [B, tokens, C] scalar_t; gamma, beta [C] scalar_t; out [B, splits, C] out_t
// math         fp32; sums in a fixed order, so that a result does not depend on the batch it is in
// grid         (splits, B) blocks of GROUPS * GROUP threads: a group of GROUP threads a token, GROUPS tokens at a time;
//              shared memory GROUPS * C floats. Many tokens are pooled in two launches, first into splits of floats.
// constants    scalar_t, out_t = float | __half | __nv_bfloat16; C % VEC == 0; GROUP a power of two;
//              GROUPS == 1 where GROUP > 32; NORM
// arch, bound  sm_75+ (bf16 sm_80+); memory-bound, for one image by latency
#include "rows.cuh"

static_assert(GROUPS == 1 || GROUP <= WARP);

extern "C" __global__ void __launch_bounds__(GROUPS* GROUP)
    global_pool(const scalar_t* x, const scalar_t* __restrict__ gamma, const scalar_t* __restrict__ beta, out_t* out,
                int tokens, float scale, float eps) {
    extern __shared__ __align__(16) float partial[];  // [GROUPS][C]
    const int splits = gridDim.x, split = blockIdx.x, b = blockIdx.y, group = threadIdx.x / GROUP;
    const int first = static_cast<long long>(tokens) * split / splits;
    const int last = static_cast<long long>(tokens) * (split + 1) / splits;
    x += static_cast<size_t>(b) * tokens * C;

    let_next_kernel_start();
    wait_for_kernels_ahead();
    Row<C, VEC, GROUP> sum, row, next;
    sum.zero();
    if (first + group < last) next.load_from(x + static_cast<size_t>(first + group) * C);
    for (int t0 = first; t0 < last; t0 += GROUPS) {  // all groups take each round: shuffles need every lane
        const int t = t0 + group;
        row.copy(next);
        if (t + GROUPS < last) next.load_from(x + static_cast<size_t>(t + GROUPS) * C);
        if constexpr (NORM) row.normalise(gamma, beta, eps);
        if (t < last) sum.add(row);
    }
    sum.store_to(partial + group * C);
    __syncthreads();
    for (int c = threadIdx.x; c < C; c += GROUPS * GROUP) {
        float y = 0;
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) y += partial[g * C + c];
        out[(static_cast<size_t>(b) * splits + split) * C + c] = from_float<out_t>(scale * y);
    }
}
