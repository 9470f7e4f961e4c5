// gemv         out[m,n] = sum_k a[m,k] w[n,k] + bias[n] for few rows m: reads w once, at once
// shapes       a [M, K], w [N, K], out [M, N] scalar_t, C-contiguous; bias [N] scalar_t or null
// math         float32 multiply-adds and sums, in an order of K alone
// grid         ceil_div(N, WARPS) blocks of WARPS warps: a warp for each n; weights are read before the kernels ahead are
//              done, so that it must start after them where they write weights
// constants    scalar_t = float | __half | __nv_bfloat16; M; K % VEC == 0; WARPS
// arch, bound  sm_75+ (bf16 sm_80+); memory-bound, by latency
#include "rows.cuh"

extern "C" __global__ void __launch_bounds__(WARPS* WARP)
    gemv(const scalar_t* a, const scalar_t* __restrict__ w, const scalar_t* __restrict__ bias, scalar_t* out, int N) {
    using R = Row<K, VEC, WARP>;
    const int lane = threadIdx.x % WARP, n = blockIdx.x * WARPS + threadIdx.x / WARP;
    const bool inside = n < N;
    typename R::template Packs<scalar_t> weights, rows[M];
    weights.load_from(w + static_cast<size_t>(inside ? n : 0) * K);
    const float b = bias && inside ? to_float(bias[n]) : 0;

    let_next_kernel_start();
    wait_for_kernels_ahead();
#pragma unroll
    for (int m = 0; m < M; ++m) rows[m].load_from(a + m * K);
    R row, column;
    column.take(weights);
#pragma unroll
    for (int m = 0; m < M; ++m) {
        float sum = 0;
        row.take(rows[m]);
        row.each_step([&](int i, int) {
#pragma unroll
            for (int k = 0; k < VEC; ++k) sum = fmaf(row.x[i][k], column.x[i][k], sum);
        });
        sum = warp_sum(sum);
        if (lane == 0 && inside) out[static_cast<size_t>(m) * N + n] = from_float<scalar_t>(sum + b);
    }
}
