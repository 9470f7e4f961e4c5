// layer_norm   out[r,c] = (x[r,c] - mean_r) * rstd_r * gamma[c] + beta[c]
// shapes       x, out [rows, C] scalar_t; gamma, beta [C] scalar_t
// math         fp32, two-pass variance in registers
// grid         ceil_div(rows, ROWS) blocks of ROWS * GROUP threads: a group of GROUP threads a row
// constants    scalar_t = float | __half | __nv_bfloat16; C % VEC == 0; GROUP a power of two; ROWS == 1 where GROUP > 32
// arch, bound  sm_75+ (bf16 sm_80+); memory-bound
#include "rows.cuh"

static_assert(ROWS == 1 || GROUP <= WARP);

extern "C" __global__ void __launch_bounds__(ROWS* GROUP)
    layer_norm(const scalar_t* x, const scalar_t* __restrict__ gamma, const scalar_t* __restrict__ beta, scalar_t* out,
               int rows, float eps) {
    const int r = blockIdx.x * ROWS + threadIdx.x / GROUP;
    const bool inside = r < rows;
    let_next_kernel_start();
    wait_for_kernels_ahead();
    Row<C, VEC, GROUP> row;
    row.load_from(x + static_cast<size_t>(inside ? r : 0) * C);  // shuffles need every lane
    row.normalise(gamma, beta, eps);
    if (inside) row.store_to(out + static_cast<size_t>(r) * C);
}
