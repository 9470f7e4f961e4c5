// wgmma_gemm   out[m, n] = act(sum_k a[m, k] w[n, k] + bias[n]) + residual[m, n],  act = the exact gelu where GELU;
//              NORM: (a[m, k] - mean_m) / deviation_m in place of a[m, k], the row's without affine part
// shapes       a [M, K], w [N, K] by their tensor maps; bias [N] scalar_t or null; residual, out [M, N] scalar_t;
//              residual may be null or out, and is null where GELU or NORM; everything on 16 bytes.
//              moments_of_a [M, groups] and, written where MOMENTS, moments [M, N / MOMENTS]: mean and sum of squared
//              deviations from it of K / groups and MOMENTS neighbours in a row; sums_of_w [N] float: of each row of w
//              GATHER: a is a map of 2 width columns instead, whose 2 x 2 neighbours are a row: all channels of the upper
//              two, then of the lower two; groups are those of all four
// math         products on tensor cores, of float in tf32; fp32 sums, which begin at bias + residual. The norm comes
//              after the product: sum_k (a - mean) / deviation w = (sum_k a w - mean sum_k w) / deviation
// grid         a tile [BM, BN] of out after the other, those of a row side by side; GROUPS warpgroups multiply, in turns:
//              one stores while the other multiplies. One warp fetches, others take the norms of a's rows. With SPLIT > 1
//              the blocks of a cluster share a tile's K and add up their parts in order. Shared memory: Tile.shared in
//              ops/wgmma.py
// constants    scalar_t = float | __half | __nv_bfloat16; BM = 64 or 128, BN = 32, 64, 96, 128, 192 or 256; GROUPS = 1 or 2;
//              STAGES >= 2; SPLIT = 1, 2, 4 or 8, which divides BM BN / 1024, and then GROUPS == 1 and BM == 64; GELU;
//              NORM: one group or an even number, and GROUPS = 2 or BN <= 96; MOMENTS = 0 (none) or what divides BN and N, 32
//              where SPLIT > 1; GATHER: width <= BM, whole slabs in K / 2, no residual. N % 32 == 0, the bytes of K are a
//              multiple of 16
// arch, bound  sm_90a only; memory-bound for K < 300, then L2 or tensor cores
#include "steps.cuh"

constexpr int SLAB = 128, BK = SLAB / sizeof(scalar_t);  // bytes and elements of k that a stage holds of each row
constexpr int PACK = Eight<scalar_t>::N;
constexpr int STAGE = (BM + BN) * SLAB, MULTIPLIERS = GROUPS * WARPGROUP;
// Two groups take the registers of the fetching warps, which can be given a warpgroup at a time.
constexpr int THREADS = MULTIPLIERS + (GROUPS == 2 ? WARPGROUP : NORM ? 3 * WARP : WARP);
constexpr int TALL = BM / 64, COLUMNS = BN / 32;  // products of 64 rows on top of each other, groups of 32 columns
constexpr int UNITS = TALL * COLUMNS * 2;         // pieces of eight sums of a thread, neighbours in a row of out
// Groups of columns whose bias and residual are loaded together, into some 96 registers.
constexpr int BATCH_MOST = 48 / ((2 * TALL + 1) * sizeof(scalar_t)),
              BATCH = BATCH_MOST < COLUMNS ? BATCH_MOST : COLUMNS;
constexpr int BLOCKS = GROUPS == 2 || TALL * BN > 128 ? 1 : TALL * BN > 64 || NORM ? 2 : 3;
static_assert(SPLIT == 1 || (GROUPS == 1 && TALL == 1 && UNITS % SPLIT == 0 && MOMENTS <= 32));
constexpr bool HALVED = NORM && GELU && sizeof(scalar_t) == 2;  // what comes out of the norm, for gelu_of_twice
constexpr int NORM_WARPS = 2, NEIGHBOURS = MOMENTS ? MOMENTS : 32;
static_assert(BN % NEIGHBOURS == 0);
// Of a tile whose K is shared each block finishes EACH pieces, of which the others' parts come to RECEIVED.
constexpr int EACH = UNITS / SPLIT, RECEIVED = STAGES * STAGE, RECEIVED_BYTES = (SPLIT - 1) * EACH * 32 * WARPGROUP;

// Of a row of a, 1 / deviation and -mean / deviation, or half of them.
DEVICE float2 norm_of(float mean, float variance, float eps) {
    const float scale = rsqrtf(fmaxf(variance, 0.0f) + eps) * (HALVED ? 0.5f : 1.0f);
    return make_float2(scale, -mean * scale);
}
// The same from the moments of so many groups of its K numbers; of neighbours in a map the second half is further on.
DEVICE float2 norm_of(const float2* moments, int groups, int further, int K, float eps) {
    if (!GATHER && groups == 1) {
        const uint2 all = load_now8(moments);
        return norm_of(__uint_as_float(all.x), __fdividef(__uint_as_float(all.y), K), eps);
    }
    const float each = __fdividef(K, groups);
    float near, sum = 0, squares = 0;
#pragma unroll(GROUPS == 2 ? 2 : 4)
    for (int i = 0; i < groups; i += 2) {
        const uint4 two = load_now(moments + i + (GATHER && 2 * i >= groups ? further : 0));
        const float one = __uint_as_float(two.x), other = __uint_as_float(two.z);
        if (i == 0) near = one;  // so that little cancels
        const float a = one - near, b = other - near;
        sum += a + b;
        squares += fmaf(each * a, a, __uint_as_float(two.y)) + fmaf(each * b, b, __uint_as_float(two.w));
    }
    const float apart = __fdividef(sum, groups);
    return norm_of(near + apart, __fdividef(squares, K) - apart * apart, eps);
}

struct Yes {
    static constexpr bool value = true;
};
struct No {
    static constexpr bool value = false;
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) __cluster_dims__(SPLIT, 1, 1)
    wgmma_gemm(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap w,
               const scalar_t* __restrict__ bias, const scalar_t* residual, scalar_t* out, const float2* moments_of_a,
               const float* __restrict__ sums_of_w, float2* moments, int M, int N, int K, int width, int groups,
               float eps) {
    extern __shared__ __align__(1024) unsigned char smem[];
    // What norms need, of two tiles: the sums of w and the bias of their columns, and their rows' norms.
    auto* const sums_of_columns = reinterpret_cast<float*>(smem + RECEIVED + RECEIVED_BYTES);
    auto* const norms_of_rows = reinterpret_cast<float2*>(sums_of_columns + 2 * 2 * BN);
    auto* const full = reinterpret_cast<unsigned long long*>(norms_of_rows + 2 * BM);
    auto *const empty = full + STAGES, *const received = empty + STAGES, *const normed = received + 1,
                *const used = normed + 2;
    const unsigned thread = threadIdx.x % WARPGROUP, lane = thread % WARP, part = SPLIT > 1 ? cluster_rank() : 0;
    const unsigned group = __shfl_sync(ALL_LANES, threadIdx.x / WARPGROUP, 0);
    const int rows = GATHER ? BM / width * width : BM;                         // of a tile
    const int tiles_n = ceil_div(N, BN), tiles = ceil_div(M, rows) * tiles_n;  // n runs faster than m
    const int first = blockIdx.x / SPLIT, step = gridDim.x / SPLIT;
    const int slab0 = ceil_div(K, BK) * part / SPLIT, slabs = ceil_div(K, BK) * (part + 1) / SPLIT - slab0;
    const auto m_of = [&](int tile) { return tile / tiles_n * rows; };
    const auto n_of = [&](int tile) { return tile % tiles_n * BN; };

    if (threadIdx.x == 0) {
#pragma unroll
        for (int i = 0; i < STAGES; ++i) barrier_init(&full[i], 1), barrier_init(&empty[i], WARPGROUP / WARP);
        if constexpr (NORM)
            for (int i = 0; i < 2; ++i) barrier_init(&normed[i], NORM_WARPS * WARP), barrier_init(&used[i], WARPGROUP);
        if constexpr (SPLIT > 1) barrier_init(received, 1);
        barrier_init_fence();
        if constexpr (SPLIT > 1) barrier_expect(received, RECEIVED_BYTES);
    }
    __syncthreads();
    if constexpr (SPLIT > 1) cluster_arrive_relaxed();
    let_next_kernel_start();

    float sum[TALL][BN / 2], scale[TALL][2], offset[TALL][2];
    const auto row_of = [&](int t, int h) { return t * 64 + int(thread / WARP) * 16 + int(lane / 4) + h * 8; };
    // What a norm needs of eight columns, from sums_of_columns on.
    struct Columns {
        float sums[8], bias[8];
    };
    const auto columns_at = [&](const float* sums) {
        Columns of = {};
        if constexpr (NORM)
#pragma unroll
            for (int e = 0; e < 8; e += PACK)
                load<PACK>(sums + 4 * e, reinterpret_cast<float (&)[PACK]>(of.sums[e])),
                    load<PACK>(sums + BN + 4 * e, reinterpret_cast<float (&)[PACK]>(of.bias[e]));
        return of;
    };
    int end = M;  // of a tile's rows
    // Eight sums of row m become results, the lane's first in column n; a warp's lanes are all in the same 32 columns.
    const auto finish = [&](float (&z)[8], int m, int n, float scale, float offset, const Columns& of) {
        if constexpr (NORM) {
#pragma unroll
            for (int e = 0; e < 8; ++e) z[e] = fmaf(z[e], scale, fmaf(of.sums[e], offset, of.bias[e]));
        }
        if constexpr (GELU) {
#pragma unroll
            for (int e = 0; e < 8; ++e) z[e] = HALVED ? gelu_of_twice(z[e]) : gelu_to<scalar_t>(z[e]);
        }
        store_eight_if(m < end && n < N, out + static_cast<size_t>(m) * N + n, z);
    };
    // Moments of what four lanes have of row m, in column n and those after it.
    const auto give_moments = [&](const float2& of_some, int m, int n) {
        if (m < end && lane % 4 == 0) moments[static_cast<size_t>(m) * (N / NEIGHBOURS) + n / NEIGHBOURS] = of_some;
    };
    if (threadIdx.x >= MULTIPLIERS) {  // fetches, one thread for all
        if constexpr (GROUPS == 2) give_registers<40>();
        const unsigned helper = threadIdx.x / WARP - MULTIPLIERS / WARP;
        if (NORM && 1 <= helper && helper <= NORM_WARPS) {  // which have the time that the products take
            const int at = (helper - 1) * WARP + lane;
            for (int turn = 0, tile = first; tile < tiles; ++turn, tile += step) {
                if (turn >= 2) barrier_wait(&used[turn % 2], turn / 2 - 1 & 1);
                float* const sums = sums_of_columns + turn % 2 * (2 * BN);
                for (int i = at, n; i < BN && (n = n_of(tile) + i) < N; i += NORM_WARPS * WARP)
                    sums[i] = sums_of_w[n], sums[BN + i] = bias ? to_float(bias[n]) * (HALVED ? 0.5f : 1.0f) : 0;
                if (turn == 0) wait_for_kernels_ahead();
                float2* const norms = norms_of_rows + turn % 2 * BM;
                for (int row = at; row < BM; row += NORM_WARPS * WARP) {
                    const int m = min(m_of(tile) + row, M - 1);
                    const size_t of_row =
                        GATHER ? size_t(2 * width * (m / width) + m % width) * (groups / 2) : size_t(m) * groups;
                    norms[row] = norm_of(moments_of_a + of_row, groups, (width - 1) * (groups / 2), K, eps);
                }
                barrier_arrive(&normed[turn % 2]);
            }
        }
        if (threadIdx.x == MULTIPLIERS) {
            prefetch_map(&a), prefetch_map(&w);
            const int total = ceil_div(tiles - first, step) * slabs;
            int tile = first, slab = 0;
            const auto advance = [&] {
                if (++slab == slabs) slab = 0, tile += step;
            };
            const auto fetch_w = [&](int stage) {
                copy_permuted_rows(smem + stage * STAGE + BM * SLAB, &w, (slab0 + slab) * BK, n_of(tile) / (4 * PACK),
                                   &full[stage]);
            };
            const auto fetch_a = [&](int stage) {
                const int k = (slab0 + slab) * BK, lower = k >= K / 2;
                if constexpr (GATHER)
                    copy_pairs(smem + stage * STAGE, &a, k - lower * (K / 2), lower, m_of(tile) / width, &full[stage]);
                else
                    copy_box(smem + stage * STAGE, &a, k, m_of(tile), &full[stage]);
            };
            const auto expect = [&](int stage) { barrier_expect(&full[stage], (rows + BN) * SLAB); };
            // Weights are there before the kernels ahead are done.
            const int begin = min(total, STAGES);
            for (int i = 0; i < begin; ++i, advance()) expect(i), fetch_w(i);
            wait_for_kernels_ahead();
            tile = first, slab = 0;
            for (int i = 0; i < begin; ++i, advance()) fetch_a(i);
            int stage = 0;
            unsigned parity = 0;
            for (int i = begin; i < total; ++i, advance()) {
                barrier_wait(&empty[stage], parity);
                expect(stage);
                fetch_w(stage), fetch_a(stage);
                if (++stage == STAGES) stage = 0, parity ^= 1;
            }
        }
    } else {
        if constexpr (GROUPS == 2) take_registers<232>();
        wait_for_kernels_ahead();
        const auto release = [&](int stage) {
            if (lane == 0) barrier_arrive(&empty[stage]);
        };
        // A barrier of the ring tells a phase from the next, not from the one after that: turns wait for each other.
        constexpr unsigned TURN = 1 + GROUPS;
        if (GROUPS == 2 && group == 1) named_barrier_arrive<MULTIPLIERS>(TURN);
        for (int turn = group, tile = first + group * step; tile < tiles; turn += GROUPS, tile += GROUPS * step) {
            const int m0 = m_of(tile), n0 = n_of(tile);
            if constexpr (GATHER) end = min(M, m0 + rows);
            if constexpr (!NORM) {  // sums begin at bias and residual, in one of the parts; loads come together
#pragma unroll
                for (int c0 = 0; c0 < COLUMNS; c0 += BATCH) {
                    Eight<scalar_t> b[BATCH], r[BATCH][TALL][2];
#pragma unroll
                    for (int i = 0; i < BATCH; ++i) {
                        const int n = n0 + (c0 + i) * 32 + lane % 4 * PACK;
                        const bool begins = c0 + i < COLUMNS && part == 0 && n < N;
                        b[i].load(bias && begins, bias + n);
#pragma unroll
                        for (int t = 0; !GELU && t < TALL; ++t)
#pragma unroll
                            for (int h = 0; h < 2; ++h) {
                                const int m = m0 + row_of(t, h);
                                r[i][t][h].load(residual && begins && m < M, residual + static_cast<size_t>(m) * N + n);
                            }
                    }
#pragma unroll
                    for (int i = 0; i < BATCH; ++i)
#pragma unroll
                        for (int e = 0; c0 + i < COLUMNS && e < 8; ++e)
#pragma unroll
                            for (int t = 0; t < TALL; ++t)
#pragma unroll
                                for (int h = 0; h < 2; ++h)
                                    sum[t][(c0 + i) * 16 + e / 2 * 4 + h * 2 + e % 2] =
                                        b[i][e] + (GELU ? 0 : r[i][t][h][e]);
                }
#pragma unroll
                for (int t = 0; t < TALL; ++t) hold(sum[t]);
            }
            if constexpr (GROUPS == 2) named_barrier<MULTIPLIERS>(TURN + group);
            int stage = turn * slabs % STAGES;
            unsigned parity = turn * slabs / STAGES % 2;
            const auto multiply = [&](auto first) {
                barrier_wait(&full[stage], parity);
                const unsigned char* slab = smem + stage * STAGE;
                const unsigned long long of_a = descriptor<128>(shared_address(slab));
                const unsigned long long of_w = descriptor<128>(shared_address(slab + BM * SLAB));
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < 4; ++k)
#pragma unroll
                    for (int t = 0; t < TALL; ++t) {
                        const unsigned long long of_rows = of_a + t * (64 * SLAB / 16) + 2 * k;
                        if (NORM && first.value && k == 0)
                            wgmma_first<scalar_t>(sum[t], of_rows, of_w);
                        else
                            wgmma<scalar_t>(sum[t], of_rows, of_w + 2 * k);
                    }
                wgmma_commit();
                if (++stage == STAGES) stage = 0, parity ^= 1;
            };
            // The first is not in the loop: the compiler serialises products whose sums come into one from outside.
            multiply(Yes());
            for (int s = 1; s < slabs; ++s) {
                const int before = stage ? stage - 1 : STAGES - 1;
                multiply(No());
                wgmma_wait<1>();
                release(before);
            }
            if (GROUPS == 2 && tile + step < tiles) named_barrier_arrive<MULTIPLIERS>(TURN + (group ^ 1));
            wgmma_wait<0>();
#pragma unroll
            for (int t = 0; t < TALL; ++t) hold(sum[t]);
            __syncwarp();
            release(stage ? stage - 1 : STAGES - 1);
            if constexpr (NORM) {
                barrier_wait(&normed[turn % 2], turn / 2 & 1);
#pragma unroll
                for (int t = 0; t < TALL; ++t)
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const float2 norm = norms_of_rows[turn % 2 * BM + row_of(t, h)];
                        scale[t][h] = norm.x, offset[t][h] = norm.y;
                    }
            }
            if constexpr (SPLIT == 1) {
                const auto sums_of = [&](int t, int h, int c, auto& z) {  // neighbours in a row, from column group c on
#pragma unroll
                    for (int e = 0; e < int(sizeof(z) / sizeof(float)); ++e)
                        z[e] = sum[t][c * 16 + e / 2 * 4 + h * 2 + e % 2];
                };
                const float* const sums = sums_of_columns + turn % 2 * (2 * BN) + lane % 4 * PACK;
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c) {
                    const int n = n0 + c * 32 + lane % 4 * PACK;
                    const Columns of = columns_at(sums + c * 32);
#pragma unroll
                    for (int t = 0; t < TALL; ++t)
#pragma unroll
                        for (int h = 0; h < 2; ++h) {
                            float z[8];
                            sums_of(t, h, c, z);
                            finish(z, m0 + row_of(t, h), n, scale[t][h], offset[t][h], of);
                            if constexpr (MOMENTS && (NORM || GELU)) {
#pragma unroll
                                for (int e = 0; e < 8; ++e) sum[t][c * 16 + e / 2 * 4 + h * 2 + e % 2] = z[e];
                            }
                        }
                }
                if constexpr (NORM) barrier_arrive(&used[turn % 2]);
                if constexpr (MOMENTS) {
#pragma unroll
                    for (int c = 0; c < COLUMNS; c += NEIGHBOURS / 32)
                        if (n0 + c * 32 < N) {
#pragma unroll
                            for (int t = 0; t < TALL; ++t)
#pragma unroll
                                for (int h = 0; h < 2; ++h) {
                                    float z[NEIGHBOURS / 4];
                                    sums_of(t, h, c, z);
                                    give_moments(moments_of_four(z), m0 + row_of(t, h), n0 + c * 32);
                                }
                        }
                }
            }
        }
    }
    if constexpr (SPLIT > 1) {
        __syncwarp();
        cluster_wait();  // the others have their barriers
        if (threadIdx.x >= MULTIPLIERS) return;
        const auto place_of = [&](int from, int i) {
            return RECEIVED + ((from * EACH + i) * 2 * WARPGROUP + thread) * 16;
        };
        float mine[EACH][8];
#pragma unroll
        for (int unit = 0; unit < UNITS; ++unit) {  // (c, h), h running fastest
            const unsigned owner = unit / EACH;
            float z[8];
#pragma unroll
            for (int e = 0; e < 8; ++e) z[e] = sum[0][unit / 2 * 16 + e / 2 * 4 + unit % 2 * 2 + e % 2];
            if (owner == part) {
#pragma unroll
                for (int e = 0; e < 8; ++e) mine[unit % EACH][e] = z[e];
            } else {
                const unsigned to = shared_address(smem + place_of(part - (part > owner), unit % EACH));
                const unsigned there = address_in_block(to, owner);
                const unsigned barrier = address_in_block(shared_address(received), owner);
                store_async_in_block(there, z[0], z[1], z[2], z[3], barrier);
                store_async_in_block(there + 16 * WARPGROUP, z[4], z[5], z[6], z[7], barrier);
            }
        }
        barrier_wait_cluster(received, 0);
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int unit = part * EACH + i, c = unit / 2, h = unit % 2;
            const int m = m_of(first) + row_of(0, h), n = n_of(first) + c * 32 + lane % 4 * PACK;
            if (n >= N) continue;
            float z[8] = {};
#pragma unroll
            for (unsigned p = 0; p < SPLIT; ++p) {  // in the order of k
                float of_p[8];
                const float* from = reinterpret_cast<const float*>(smem + place_of(p - (p > part), i));
                if (p != part)
                    load<4>(from, reinterpret_cast<float (&)[4]>(of_p[0])),
                        load<4>(from + 4 * WARPGROUP, reinterpret_cast<float (&)[4]>(of_p[4]));
#pragma unroll
                for (int e = 0; e < 8; ++e) z[e] += p == part ? mine[i][e] : of_p[e];
            }
            const Columns of = columns_at(sums_of_columns + n - n_of(first));
            finish(z, m, n, h ? scale[0][1] : scale[0][0], h ? offset[0][1] : offset[0][0], of);
            if constexpr (MOMENTS) give_moments(moments_of_four(z), m, n);
        }
    }
}
