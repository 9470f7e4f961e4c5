// A row of C elements in the registers of GROUP threads, float32, and what a LayerNorm does with it.
// Thread i of the group holds the packs i, i + GROUP, ... of VEC elements: neighbours read neighbouring bytes.
#pragma once
#include "common.cuh"

template <int C, int VEC, int GROUP>
struct Row {
    static constexpr int PACKS = C / VEC;
    static constexpr int STEPS = ceil_div(PACKS, GROUP);
    static_assert(C % VEC == 0, "packs must fill a row");
    static_assert((GROUP & (GROUP - 1)) == 0 && GROUP <= 1024, "a group is a power of two");

    float x[STEPS][VEC];
    const int rank = threadIdx.x % GROUP;  // of the thread in its group

    // f(float (&pack)[VEC], int first channel) for each of the thread's packs.
    template <typename F>
    DEVICE void each(F f) {
#pragma unroll
        for (int i = 0; i < STEPS; ++i)
            if (int pack = rank + i * GROUP; PACKS % GROUP == 0 || pack < PACKS) f(x[i], pack * VEC);
    }

    DEVICE void zero() {
        each([](float (&p)[VEC], int) {
#pragma unroll
            for (int k = 0; k < VEC; ++k) p[k] = 0;
        });
    }

    template <typename T>
    DEVICE void load_from(const T* row) {
        each([&](float (&p)[VEC], int c) { load<VEC>(row + c, p); });
    }

    template <typename T>
    DEVICE void add(const T* row) {
        each([&](float (&p)[VEC], int c) {
            float y[VEC];
            load<VEC>(row + c, y);
#pragma unroll
            for (int k = 0; k < VEC; ++k) p[k] += y[k];
        });
    }

    DEVICE void copy(const Row& other) {
#pragma unroll
        for (int i = 0; i < STEPS; ++i)
#pragma unroll
            for (int k = 0; k < VEC; ++k) x[i][k] = other.x[i][k];
    }

    DEVICE void add(const Row& other) {
#pragma unroll
        for (int i = 0; i < STEPS; ++i)
#pragma unroll
            for (int k = 0; k < VEC; ++k) x[i][k] += other.x[i][k];
    }

    template <typename T>
    DEVICE void store_to(T* row, float scale = 1.0f) {
        each([&](float (&p)[VEC], int c) {
            float y[VEC];
#pragma unroll
            for (int k = 0; k < VEC; ++k) y[k] = scale * p[k];
            store<VEC>(row + c, y);
        });
    }

    // x = (x - mean) / sqrt(var + eps) * gamma + beta. Two passes: E[x^2] - E[x]^2 cancels where |mean| >> deviation.
    // Every thread of the group takes part; where GROUP > 32 the group is the block.
    template <typename T>
    DEVICE void normalise(const T* gamma, const T* beta, float eps) {
        float sum = 0, squares = 0;
        each([&](float (&p)[VEC], int) {
#pragma unroll
            for (int k = 0; k < VEC; ++k) sum += p[k];
        });
        const float mean = group_sum<GROUP>(sum) * (1.0f / C);
        each([&](float (&p)[VEC], int) {
#pragma unroll
            for (int k = 0; k < VEC; ++k) p[k] -= mean, squares = fmaf(p[k], p[k], squares);
        });
        const float rstd = rsqrtf(group_sum<GROUP>(squares) * (1.0f / C) + eps);
        each([&](float (&p)[VEC], int c) {
            float g[VEC], b[VEC];
            load<VEC>(gamma + c, g), load<VEC>(beta + c, b);
#pragma unroll
            for (int k = 0; k < VEC; ++k) p[k] = fmaf(p[k] * rstd, g[k], b[k]);
        });
    }
};
