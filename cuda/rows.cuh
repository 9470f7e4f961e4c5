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

    // The thread's packs as they are in memory: asked for now, awaited where they are used.
    template <typename T>
    struct Packs {
        Pack<T, VEC> v[STEPS];

        DEVICE void load_from(const T* row) {
            using W = typename Word<sizeof(T) * VEC>::type;
#pragma unroll
            for (int i = 0; i < STEPS; ++i) {
                const int pack = threadIdx.x % GROUP + i * GROUP;
                if (PACKS % GROUP && pack >= PACKS) continue;
                if constexpr (sizeof(W) == 16)
                    v[i].word = load_now(row + pack * VEC);
                else
                    v[i].word = *reinterpret_cast<const W*>(row + pack * VEC);
            }
        }
        DEVICE void zero() {
#pragma unroll
            for (int i = 0; i < STEPS; ++i) v[i].word = {};
        }
    };

    float x[STEPS][VEC];
    const int rank = threadIdx.x % GROUP;  // of the thread in its group

    // f(int step, int first channel) for each of the thread's packs.
    template <typename F>
    DEVICE void each_step(F f) {
#pragma unroll
        for (int i = 0; i < STEPS; ++i)
            if (int pack = rank + i * GROUP; PACKS % GROUP == 0 || pack < PACKS) f(i, pack * VEC);
    }

    // f(float (&pack)[VEC], int first channel) for each of the thread's packs.
    template <typename F>
    DEVICE void each(F f) {
        each_step([&](int i, int c) { f(x[i], c); });
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
    DEVICE void take(const Packs<T>& packs) {
        each_step([&](int i, int) {
#pragma unroll
            for (int k = 0; k < VEC; ++k) x[i][k] = to_float(packs.v[i].v[k]);
        });
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

    DEVICE void add(const Row& other) {
#pragma unroll
        for (int i = 0; i < STEPS; ++i)
#pragma unroll
            for (int k = 0; k < VEC; ++k) x[i][k] += other.x[i][k];
    }

    template <typename T>
    DEVICE void store_to(T* row) {
        each([&](float (&p)[VEC], int c) { store<VEC>(row + c, p); });
    }

    // x = x - mean; gives 1 / sqrt(var + eps). Two passes: E[x^2] - E[x]^2 cancels where |mean| >> deviation.
    // Every thread of the group takes part; where GROUP > 32 the group is the block.
    DEVICE float centre(float eps) {
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
        return rsqrtf(group_sum<GROUP>(squares) * (1.0f / C) + eps);
    }

    // x = (x - mean) / sqrt(var + eps) * gamma + beta.
    template <typename T>
    DEVICE void normalise(const Packs<T>& gamma, const Packs<T>& beta, float eps) {
        const float rstd = centre(eps);
        each_step([&](int i, int) {
#pragma unroll
            for (int k = 0; k < VEC; ++k)
                x[i][k] = fmaf(x[i][k] * rstd, to_float(gamma.v[i].v[k]), to_float(beta.v[i].v[k]));
        });
    }
    template <typename T>
    DEVICE void normalise(const T* gamma, const T* beta, float eps) {
        Packs<T> g, b;
        g.load_from(gamma), b.load_from(beta);
        normalise(g, b, eps);
    }
};
