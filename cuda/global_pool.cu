// global_pool  out[b,s,c] = scale * sum over the tokens t of split s of LN(x[b,t])[c], without the LN where !NORM
// shapes       x [B, tokens, C] scalar_t; gamma, beta [C] scalar_t; out [B, splits, C] out_t
// math         fp32; sums in an order of the tokens and of CLUSTER * GROUPS alone
// grid         (splits * CLUSTER, B) blocks of GROUPS * GROUP threads: a group of GROUP threads a token; the groups of a
//              cluster take ROWS tokens each at a time; shared memory GROUPS * C floats. Many tokens are pooled in two
//              launches, first into splits of floats.
// constants    scalar_t, out_t = float | __half | __nv_bfloat16; C % VEC == 0; GROUP a power of two; ROWS;
//              GROUPS == 1 where GROUP > 32; CLUSTER == 1 before sm_90; NORM
// arch, bound  sm_75+ (bf16 sm_80+); memory-bound, for few images by latency
#include "hopper.cuh"
#include "rows.cuh"

#if __CUDA_ARCH__ >= 900
#define __cluster__() __cluster_dims__(CLUSTER, 1, 1)
#else
#define __cluster__()
#endif

constexpr int THREADS = GROUPS * GROUP, SUMS = CLUSTER * GROUPS;
constexpr int SHARE = ceil_div(C, CLUSTER), OUTPUTS = ceil_div(SHARE, THREADS);  // of a block, of a thread
static_assert(GROUPS == 1 || GROUP <= WARP);

extern "C" __global__ void __cluster__() __launch_bounds__(GROUPS* GROUP)
    global_pool(const scalar_t* x, const scalar_t* __restrict__ gamma, const scalar_t* __restrict__ beta, out_t* out,
                int tokens, float scale, float eps) {
    extern __shared__ __align__(16) float partial[];  // [GROUPS][C]
    const int rank = CLUSTER > 1 ? cluster_rank() : 0, group = rank * GROUPS + threadIdx.x / GROUP;
    const int splits = gridDim.x / CLUSTER, split = blockIdx.x / CLUSTER, b = blockIdx.y;
    const int first = static_cast<long long>(tokens) * split / splits;
    const int last = static_cast<long long>(tokens) * (split + 1) / splits;
    x += static_cast<size_t>(b) * tokens * C;

    let_next_kernel_start();
    wait_for_kernels_ahead();
    scalar_t g[OUTPUTS], h[OUTPUTS];  // on their way with the tokens, not after them
    if constexpr (NORM) {
#pragma unroll
        for (int i = 0; i < OUTPUTS; ++i) {
            const int c = min(rank * SHARE + static_cast<int>(threadIdx.x) + i * THREADS, C - 1);
            g[i] = gamma[c], h[i] = beta[c];
        }
    }
    using R = Row<C, VEC, GROUP>;
    R sum, row;
    sum.zero();
    for (int t0 = first; t0 < last; t0 += SUMS * ROWS) {  // all groups take each round: shuffles need every lane
        typename R::template Packs<scalar_t> rows[ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            const int t = t0 + i * SUMS + group;
            rows[i].zero();  // which is their LayerNorm, too
            if (t < last) rows[i].load_from(x + static_cast<size_t>(t) * C);
        }
        if (eps < 0) return;  // never so: a branch, for loads are not put off across one
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            row.take(rows[i]);
            const float rstd = NORM ? row.centre(eps) : 1.0f;
            sum.each_step([&](int j, int) {
#pragma unroll
                for (int k = 0; k < VEC; ++k) sum.x[j][k] = fmaf(rstd, row.x[j][k], sum.x[j][k]);
            });
        }
    }
    sum.store_to(partial + threadIdx.x / GROUP * C);
    if constexpr (CLUSTER > 1)
        cluster_barrier();
    else
        __syncthreads();
#pragma unroll
    for (int i = 0; i < OUTPUTS; ++i) {
        const int k = threadIdx.x + i * THREADS, c = rank * SHARE + k;
        if (k >= SHARE || c >= C) break;
        float y = 0;
#pragma unroll
        for (int j = 0; j < SUMS; ++j) {
            const float* of = partial + j % GROUPS * C + c;
            y += CLUSTER > 1 ? load_of_cluster(of, j / GROUPS) : *of;
        }
        if constexpr (NORM) y = fmaf(y, to_float(g[i]), (last - first) * to_float(h[i]));
        out[(static_cast<size_t>(b) * splits + split) * C + c] = from_float<out_t>(scale * y);
    }
    if constexpr (CLUSTER > 1)
        cluster_arrive_relaxed(), cluster_wait();  // none is gone before others have read its sums
}
