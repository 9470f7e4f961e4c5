// Small steps that several kernels of SM 9.0 have in common.
#pragma once
#include "hopper.cuh"

// Of 32 numbers, eight in each of four neighbouring lanes: their mean, and the sum of their squared deviations from it.
DEVICE float2 moments_of_four(const float (&z)[8]) {
    float total = 0, squares = 0;
#pragma unroll
    for (int e = 0; e < 8; ++e) total += z[e];
    const float mean = warp_sum<4>(total) * (1.0f / 32);
#pragma unroll
    for (int e = 0; e < 8; ++e) squares = fmaf(z[e] - mean, z[e] - mean, squares);
    return make_float2(mean, warp_sum<4>(squares));
}
