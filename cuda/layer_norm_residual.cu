// layer_norm_residual   out[r,c] = x[r,c] + (y[r,c] - mean_r) * rstd_r * gamma[c] + beta[c],  mean and rstd of y
// shapes       x, y, out [rows, C] scalar_t; gamma, beta [C] scalar_t; out may be x or y
// math         fp32, two-pass variance in registers; one rounding, after the sum
// grid         ceil_div(rows, ROWS) blocks of ROWS * GROUP threads: a group of GROUP threads a row
// constants    scalar_t = float | __half | __nv_bfloat16; C % VEC == 0; GROUP a power of two; ROWS == 1 where GROUP > 32
// arch, bound  sm_75+ (bf16 sm_80+); memory-bound
#include "rows.cuh"

static_assert(ROWS == 1 || GROUP <= WARP);

extern "C" __global__ void __launch_bounds__(ROWS* GROUP)
    layer_norm_residual(const scalar_t* x, const scalar_t* y, const scalar_t* __restrict__ gamma,
                        const scalar_t* __restrict__ beta, scalar_t* out, int rows, float eps) {
    const int r = blockIdx.x * ROWS + threadIdx.x / GROUP;
    const bool inside = r < rows;
    const size_t at = static_cast<size_t>(inside ? r : 0) * C;
    let_next_kernel_start();
    wait_for_kernels_ahead();
    Row<C, VEC, GROUP> row, residual;
    row.load_from(y + at);
    residual.load_from(x + at);  // under way while the statistics are summed
    row.normalise(gamma, beta, eps);
    row.add(residual);
    if (inside) row.store_to(out + at);
}
