// The rest of cuda/common.cuh on the CPU: what the kernels that are bound by memory use.
#pragma once
#include "common.cuh"

#define __host__
#undef DEVICE
#define DEVICE inline
template <typename A, typename B>
constexpr bool is_same = false;
template <typename A>
constexpr bool is_same<A, A> = true;
template <> struct Word<1> { using type = unsigned char; };

struct __nv_bfloat16 {
    unsigned short bits;
    __nv_bfloat16() = default;
    __nv_bfloat16(float x) {
        const unsigned u = __float_as_uint(x);
        bits = (u + 0x7fff + (u >> 16 & 1)) >> 16;
    }
    operator float() const {
        const unsigned u = unsigned(bits) << 16;
        float x;
        std::memcpy(&x, &u, 4);
        return x;
    }
};
static float to_float(__nv_bfloat16 x) { return x; }
static float rsqrtf(float x) { return 1 / std::sqrt(x); }

template <int THREADS>
float group_sum(float x) {
    if constexpr (THREADS <= WARP) {
        return warp_sum<THREADS>(x);
    } else {
        static float partial[THREADS];
        partial[threadIdx.x] = x;
        __syncthreads();
        float sum = 0;
        for (float y : partial) sum += y;
        __syncthreads();
        return sum;
    }
}

template <typename T>
void mma_16x8x16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    mma_step<T, false>(d, a, b);
}
