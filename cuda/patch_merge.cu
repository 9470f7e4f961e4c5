// patch_merge  out[b,h,w] = LN([x[b,2h,2w] x[b,2h+1,2w] x[b,2h,2w+1] x[b,2h+1,2w+1]]), without the LN where !NORM;
//              IN_PLACE: the second and the third exchanged, which is the order in which they lie in memory;
//              the reduction 4C -> 2C that follows is a matrix product of its own
// shapes       x [B, H, W, C], out [B, ceil(H/2), ceil(W/2), 4C] scalar_t; gamma, beta [4C] scalar_t; zeros beyond H, W
// math         fp32, two-pass variance in registers
// grid         ceil_div(rows, ROWS) blocks of ROWS * GROUP threads: a group of GROUP threads a row of out
// constants    scalar_t = float | __half | __nv_bfloat16; C % VEC == 0; GROUP a power of two; ROWS == 1 where GROUP > 32;
//              NORM, IN_PLACE
// arch, bound  sm_75+ (bf16 sm_80+); memory-bound
#include "rows.cuh"

static_assert(ROWS == 1 || GROUP <= WARP);
static_assert(C % VEC == 0, "a pack must not straddle two tokens");

extern "C" __global__ void __launch_bounds__(ROWS* GROUP)
    patch_merge(const scalar_t* x, const scalar_t* __restrict__ gamma, const scalar_t* __restrict__ beta, scalar_t* out,
                int rows, int H, int W, float eps) {
    const int r = blockIdx.x * ROWS + threadIdx.x / GROUP;
    const bool inside = r < rows;
    const int W2 = (W + 1) / 2, H2 = (H + 1) / 2;
    const int w = 2 * (r % W2), h = 2 * (r / W2 % H2), b = r / W2 / H2;

    using R = Row<4 * C, VEC, GROUP>;
    typename R::template Packs<scalar_t> g, s;
    if constexpr (NORM) g.load_from(gamma), s.load_from(beta);
    let_next_kernel_start();
    wait_for_kernels_ahead();
    R row;
    row.each([&](float (&pack)[VEC], int k) {
        const int part = k / C;
        const int y = h + (IN_PLACE ? part / 2 : part % 2), z = w + (IN_PLACE ? part % 2 : part / 2);
        const bool exists = inside && y < H && z < W;
        const size_t token = exists ? (static_cast<size_t>(b) * H + y) * W + z : 0;  // a load that is always made
        load<VEC>(x + token * C + k % C, pack);                                      // does not wait for others
#pragma unroll
        for (int i = 0; i < VEC; ++i) pack[i] = exists ? pack[i] : 0;
    });
    if constexpr (NORM) row.normalise(g, s, eps);
    if (inside) row.store_to(out + static_cast<size_t>(r) * 4 * C);
}
