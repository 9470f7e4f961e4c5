// What the kernels of the attention half of a block share, of SM 9.0: masks, logits, softmax of a warpgroup's 64 rows.
#pragma once
#include "steps.cuh"

constexpr float LOG2_E = 1.4426950408889634f;

// Bit 4 j + e: key 8 j + 2 (lane % 4) + e % 2 and query row + 8 (e / 2) are on different sides of the row (or column)
// where the shift's second region begins.
template <int WINDOW>
DEVICE unsigned region_bits(unsigned row, unsigned t, unsigned begins, bool columns) {
    unsigned long long firsts = 0;  // bit n: token n is the first of its row; then, is in the second region
#pragma unroll
    for (int i = 0; i < WINDOW; ++i) firsts |= 1ull << WINDOW * i;
    const unsigned line = (1u << WINDOW) - (1u << begins);
    const unsigned long long second = columns ? line * firsts : ~0ull << begins * WINDOW, keys = second >> 2 * t;
    auto pairs = [](unsigned bits) {  // two bits of each byte to each four bits
        bits &= 0x03030303;
        bits = (bits | bits >> 4) & 0x00330033;
        return (bits | bits >> 8) & 0x3333;
    };
    const unsigned two = pairs(static_cast<unsigned>(keys)) | pairs(static_cast<unsigned>(keys >> 32)) << 16;
    return (two ^ (second >> row & 1 ? 0x33333333 : 0)) | (two ^ (second >> (row + 8) & 1 ? 0x33333333 : 0)) << 2;
}

// k and v, the second and third 16 of a thread's sums, to two tiles of 64 rows of 64 bytes; at(piece): where stmatrix's
// lanes begin that have the 8 columns of `piece` and of the one after it.
template <typename T, typename At>
DEVICE void store_k_v(unsigned char* tiles, const float (&qkv)[48], At at) {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
            const float* s = qkv + 16 + m * 16 + j * 4;
            store_matrix_x4(shared_address(tiles + m * (64 * 64) + at(j)), round2<T>(s[0], s[1]), round2<T>(s[2], s[3]),
                            round2<T>(s[4], s[5]), round2<T>(s[6], s[7]));
        }
}

// What logits start as, before q and k are added: a thread's position bias, which the image holds in this order.
template <int HALF_KEYS>
DEVICE void start_logits(float (&s)[HALF_KEYS], const uint4 (&bias)[4]) {
#pragma unroll
    for (int p = 0; p < 4; ++p) {
        const unsigned words[4] = {bias[p].x, bias[p].y, bias[p].z, bias[p].w};
#pragma unroll
        for (int k = 0; k < 4; ++k)
            if (8 * p + 2 * k < HALF_KEYS) {
                const float2 two = unpack2<__half>(words[k]);
                s[8 * p + 2 * k] = two.x, s[8 * p + 2 * k + 1] = two.y;
            }
    }
}
template <int HALF_KEYS>
DEVICE void mask_logits(float (&s)[HALF_KEYS], unsigned bits) {
#pragma unroll
    for (int e = 0; e < HALF_KEYS; ++e)
        if (bits >> e & 1) s[e] -= 100 * LOG2_E;
}

// p = 2^(s - the row's largest) as a product's left operand, sum = this thread's part of the rows' sums of it.
template <typename T, int HALF_KEYS>
DEVICE void exponentiate(float (&s)[HALF_KEYS], unsigned (&p)[4][4], float (&sum)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float high = s[2 * r];
#pragma unroll
        for (int j = 0; j < HALF_KEYS / 4; ++j) high = fmaxf(high, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
        high = warp_max<4>(high);
        sum[r] = 0;
#pragma unroll
        for (int j = 0; j < HALF_KEYS / 4; ++j) {
            s[4 * j + 2 * r] = fast_exp2(s[4 * j + 2 * r] - high);
            s[4 * j + 2 * r + 1] = fast_exp2(s[4 * j + 2 * r + 1] - high);
            sum[r] += s[4 * j + 2 * r] + s[4 * j + 2 * r + 1];
        }
    }
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int e = 0; e < 4; ++e)
            p[k][e] = 8 * k + 2 * e < HALF_KEYS ? round2<T>(s[8 * k + 2 * e], s[8 * k + 2 * e + 1]) : 0;
}

// result = p v of 64 rows of v; sum becomes the reciprocal of the whole row's, by which result is still to be multiplied.
template <typename T>
DEVICE void weigh(float (&result)[16], const unsigned (&p)[4][4], unsigned long long v, float (&sum)[2]) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {  // 16 rows of v a step
        if (k == 0)
            wgmma_first<T, 1>(result, p[k], v);
        else
            wgmma<T, 1>(result, p[k], v + k * (16 * 64 / 16));
    }
    wgmma_commit();
#pragma unroll
    for (int r = 0; r < 2; ++r) sum[r] = __fdividef(1.0f, warp_sum<4>(sum[r]));
    wgmma_wait<0>();
    hold(result);
}
