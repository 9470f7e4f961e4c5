// Small steps that several kernels of SM 9.0 have in common.
#pragma once
#include "hopper.cuh"

// The eight of 32 neighbours in global memory that are one of four lanes', as they are stored there: packs of N, which lie
// side by side with those of the other lanes, so that a warp reads and writes whole sectors.
template <typename T>
struct Eight {
    static constexpr int N = 16 / sizeof(T);
    Pack<T, N> parts[8 / N];

    DEVICE void load(bool yes, const T* p) {  // zeros where not
#pragma unroll
        for (int k = 0; k < 8 / N; ++k) parts[k].word = load_if(yes, p + k * 4 * N);
    }
    DEVICE float operator[](int e) const { return to_float(parts[e / N].v[e % N]); }
};
template <typename T>
DEVICE void store_eight_if(bool yes, T* p, const float (&x)[8]) {
    constexpr int N = Eight<T>::N;
#pragma unroll
    for (int k = 0; k < 8; k += N) {
        Pack<T, N> pack;
#pragma unroll
        for (int e = 0; e < N; ++e) pack.v[e] = from_float<T>(x[k + e]);
        store_if(yes, p + 4 * k, pack.word);
    }
}

// Of 4 N numbers, N in each of four neighbouring lanes: their mean, and the sum of their squared deviations from it.
template <int N>
DEVICE float2 moments_of_four(const float (&z)[N]) {
    float total = 0, squares = 0;
#pragma unroll
    for (int e = 0; e < N; ++e) total += z[e];
    const float mean = warp_sum<4>(total) * (1.0f / (4 * N));
#pragma unroll
    for (int e = 0; e < N; ++e) squares = fmaf(z[e] - mean, z[e] - mean, squares);
    return make_float2(mean, warp_sum<4>(squares));
}
