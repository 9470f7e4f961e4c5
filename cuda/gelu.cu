// gelu         out[i] = v / 2 (1 + erf(v / sqrt 2)),  v = x[i] + bias[i % C]
// shapes       x, out n elements of scalar_t, out may be x; bias [C] scalar_t or null
// math         fp32
// grid         ceil_div(n, 256 * VEC) blocks of 256 threads
// constants    scalar_t = float | __half | __nv_bfloat16; n % VEC == 0, and C % VEC == 0 where there is a bias
// arch, bound  sm_75+ (bf16 sm_80+); memory-bound
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256)
    gelu(const scalar_t* x, const scalar_t* __restrict__ bias, scalar_t* out, long long n, int C) {
    const long long i = (static_cast<long long>(blockIdx.x) * 256 + threadIdx.x) * VEC;
    if (i >= n) return;
    let_next_kernel_start();
    wait_for_kernels_ahead();
    float v[VEC], b[VEC] = {};
    load<VEC>(x + i, v);
    if (bias) load<VEC>(bias + i % C, b);
#pragma unroll
    for (int k = 0; k < VEC; ++k) v[k] = gelu(v[k] + b[k]);
    store<VEC>(out + i, v);
}
