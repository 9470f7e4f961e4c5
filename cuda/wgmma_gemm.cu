// wgmma_gemm   out[m, n] = act(sum_k a[m, k] w[n, k] + bias[n]) + residual[m, n],  act = the exact gelu where GELU
// shapes       a [M, K], w [N, K] by their tensor maps; bias [N] scalar_t or null; residual, out [M, N] scalar_t;
//              residual may be null or out, and is null where GELU; everything on 16 bytes
// math         products on tensor cores, of float in tf32; fp32 sums, which begin at bias + residual
// grid         a tile [BM, BN] of out after the other, those of a row side by side; GROUPS warpgroups multiply, in turns:
//              one stores while the other multiplies. One warp fetches. With SPLIT > 1 the blocks of a cluster share a
//              tile's K and add up their parts in order. Shared memory: Tile.shared in ops/wgmma.py
// constants    scalar_t = float | __half | __nv_bfloat16; BM = 64 or 128, BN = 32, 64, 96, 128, 192 or 256; GROUPS = 1 or 2;
//              STAGES >= 2; SPLIT = 1, 2, 4 or 8, which divides BM BN / 1024, and then GROUPS == 1; GELU. N % 32 == 0,
//              the bytes of K are a multiple of 16
// arch, bound  sm_90a only; memory-bound for K < 300, then L2 or tensor cores
#include "hopper.cuh"

constexpr int SLAB = 128, BK = SLAB / sizeof(scalar_t);  // bytes and elements of k that a stage holds of each row
constexpr int STAGE = (BM + BN) * SLAB, MULTIPLIERS = GROUPS * WARPGROUP;
// Two groups take the registers of the fetching warps, which can be given a warpgroup at a time.
constexpr int THREADS = MULTIPLIERS + (GROUPS == 2 ? WARPGROUP : WARP);
constexpr int TALL = BM / 64, COLUMNS = BN / 32;  // products of 64 rows on top of each other, groups of 32 columns
constexpr int UNITS = TALL * COLUMNS * 2;         // pieces of eight sums of a thread, neighbours in a row of out
constexpr int BLOCKS = GROUPS == 2 || TALL * BN > 128 ? 1 : TALL * BN > 64 ? 2 : 3;
static_assert(SPLIT == 1 || (GROUPS == 1 && UNITS % SPLIT == 0));

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) __cluster_dims__(SPLIT, 1, 1)
    wgmma_gemm(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap w,
               const scalar_t* __restrict__ bias, const scalar_t* residual, scalar_t* out, int M, int N, int K) {
    extern __shared__ __align__(1024) unsigned char smem[];
    auto* const full = reinterpret_cast<unsigned long long*>(smem + STAGES * STAGE);
    auto* const empty = full + STAGES;
    const unsigned thread = threadIdx.x % WARPGROUP, lane = thread % WARP, part = SPLIT > 1 ? cluster_rank() : 0;
    const unsigned group = __shfl_sync(ALL_LANES, threadIdx.x / WARPGROUP, 0);
    const int tiles_n = ceil_div(N, BN), tiles = ceil_div(M, BM) * tiles_n;  // n runs faster than m
    const int first = blockIdx.x / SPLIT, step = gridDim.x / SPLIT;
    const int slab0 = ceil_div(K, BK) * part / SPLIT, slabs = ceil_div(K, BK) * (part + 1) / SPLIT - slab0;
    const auto m_of = [&](int tile) { return tile / tiles_n * BM; };
    const auto n_of = [&](int tile) { return tile % tiles_n * BN; };

    if (threadIdx.x == 0) {
#pragma unroll
        for (int i = 0; i < STAGES; ++i) barrier_init(&full[i], 1), barrier_init(&empty[i], WARPGROUP / WARP);
        barrier_init_fence();
    }
    __syncthreads();
    let_next_kernel_start();

    float sum[TALL][BN / 2];
    const auto row_of = [&](int t, int h) { return t * 64 + int(thread / WARP) * 16 + int(lane / 4) + h * 8; };
    if (threadIdx.x >= MULTIPLIERS) {  // fetches, one thread for all
        if constexpr (GROUPS == 2) give_registers<40>();
        if (threadIdx.x == MULTIPLIERS) {
            prefetch_map(&a), prefetch_map(&w);
            const int total = ceil_div(tiles - first, step) * slabs;
            int tile = first, slab = 0;
            const auto advance = [&] {
                if (++slab == slabs) slab = 0, tile += step;
            };
            const auto fetch_w = [&](int stage) {
                copy_permuted_rows(smem + stage * STAGE + BM * SLAB, &w, (slab0 + slab) * BK, n_of(tile) / 32,
                                   &full[stage]);
            };
            const auto fetch_a = [&](int stage) {
                copy_box(smem + stage * STAGE, &a, (slab0 + slab) * BK, m_of(tile), &full[stage]);
            };
            // Weights are there before the kernels ahead are done.
            const int begin = min(total, STAGES);
            for (int i = 0; i < begin; ++i, advance()) barrier_expect(&full[i], STAGE), fetch_w(i);
            wait_for_kernels_ahead();
            tile = first, slab = 0;
            for (int i = 0; i < begin; ++i, advance()) fetch_a(i);
            int stage = 0;
            unsigned parity = 0;
            for (int i = begin; i < total; ++i, advance()) {
                barrier_wait(&empty[stage], parity);
                barrier_expect(&full[stage], STAGE);
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
            // Sums begin at bias and residual, in one of the parts.
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) {
                const int n = n0 + c * 32 + lane % 4 * 8;
                float b[8] = {};
                if (bias && part == 0 && n < N) load<8>(bias + n, b);
#pragma unroll
                for (int t = 0; t < TALL; ++t)
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const int m = m0 + row_of(t, h);
                        float r[8] = {};
                        if (!GELU && residual && part == 0 && m < M && n < N)
                            load<8>(residual + static_cast<size_t>(m) * N + n, r);
#pragma unroll
                        for (int e = 0; e < 8; ++e) sum[t][c * 16 + e / 2 * 4 + h * 2 + e % 2] = b[e] + r[e];
                    }
            }
            if constexpr (GROUPS == 2) named_barrier<MULTIPLIERS>(TURN + group);
            int stage = turn * slabs % STAGES;
            unsigned parity = turn * slabs / STAGES % 2;
            const auto multiply = [&] {
                barrier_wait(&full[stage], parity);
                const unsigned char* slab = smem + stage * STAGE;
                const unsigned long long of_a = descriptor<128>(shared_address(slab));
                const unsigned long long of_w = descriptor<128>(shared_address(slab + BM * SLAB));
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < 4; ++k)
#pragma unroll
                    for (int t = 0; t < TALL; ++t)
                        wgmma<scalar_t>(sum[t], of_a + t * (64 * SLAB / 16) + 2 * k, of_w + 2 * k);
                wgmma_commit();
                if (++stage == STAGES) stage = 0, parity ^= 1;
            };
#pragma unroll
            for (int t = 0; t < TALL; ++t) hold(sum[t]);
            multiply();  // not in the loop: the compiler serialises products whose sums come into a loop from outside
            for (int s = 1; s < slabs; ++s) {
                const int before = stage ? stage - 1 : STAGES - 1;
                multiply();
                wgmma_wait<1>();
                release(before);
            }
            if (GROUPS == 2 && tile + step < tiles) named_barrier_arrive<MULTIPLIERS>(TURN + (group ^ 1));
            wgmma_wait<0>();
#pragma unroll
            for (int t = 0; t < TALL; ++t) hold(sum[t]);
            __syncwarp();
            release(stage ? stage - 1 : STAGES - 1);
            if constexpr (SPLIT == 1) {
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c) {
                    const int n = n0 + c * 32 + lane % 4 * 8;
                    if (n >= N) continue;
#pragma unroll
                    for (int t = 0; t < TALL; ++t)
#pragma unroll
                        for (int h = 0; h < 2; ++h) {
                            float z[8];
#pragma unroll
                            for (int e = 0; e < 8; ++e) {
                                z[e] = sum[t][c * 16 + e / 2 * 4 + h * 2 + e % 2];
                                if constexpr (GELU) z[e] = gelu_to<scalar_t>(z[e]);
                            }
                            const int m = m0 + row_of(t, h);
                            if (m < M) store<8>(out + static_cast<size_t>(m) * N + n, z);
                        }
                }
            }
        }
    }
    if constexpr (SPLIT > 1) {
        __syncwarp();
        // All parts go to shared memory, a thread's sums apart by a row of threads; each block adds up some pieces.
        auto* const parts = reinterpret_cast<float*>(smem);
        const bool multiplies = threadIdx.x < MULTIPLIERS;
        if (multiplies) {
            named_barrier<WARPGROUP>(1);  // all have read the ring
#pragma unroll
            for (int t = 0; t < TALL; ++t)
#pragma unroll
                for (int i = 0; i < BN / 2; ++i) parts[(t * (BN / 2) + i) * WARPGROUP + thread] = sum[t][i];
        }
        cluster_barrier();
        if (multiplies) {
#pragma unroll
            for (int i = 0; i < UNITS / SPLIT; ++i) {  // (c, t, h), h running fastest
                const int unit = part * (UNITS / SPLIT) + i, h = unit % 2, t = unit / 2 % TALL, c = unit / 2 / TALL;
                const int m = m_of(first) + row_of(t, h), n = n_of(first) + c * 32 + lane % 4 * 8;
                if (m >= M || n >= N) continue;
                float parts_of[SPLIT][8], z[8] = {};
#pragma unroll
                for (int p = 0; p < SPLIT; ++p)
#pragma unroll
                    for (int e = 0; e < 8; ++e)
                        parts_of[p][e] = load_of_cluster(
                            parts + (t * (BN / 2) + c * 16 + e / 2 * 4 + h * 2 + e % 2) * WARPGROUP + thread, p);
#pragma unroll
                for (int p = 0; p < SPLIT; ++p)
#pragma unroll
                    for (int e = 0; e < 8; ++e) z[e] += parts_of[p][e];
                if constexpr (GELU) {
#pragma unroll
                    for (int e = 0; e < 8; ++e) z[e] = gelu_to<scalar_t>(z[e]);
                }
                store<8>(out + static_cast<size_t>(m) * N + n, z);
            }
        }
        __syncwarp();
        cluster_arrive_relaxed(), cluster_wait();  // the other blocks are done with this one's shared memory
    }
}
