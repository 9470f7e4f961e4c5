// mlp_block    out[m] = x[m] + W2 gelu(W1 LN(x[m]) + b1) + b2, V1; x[m] + LN(W2 gelu(W1 x[m] + b1) + b2), V2: POST_NORM
// shapes       x, out [M, C] scalar_t, C-contiguous, apart from each other; weights scalar_t: W1 [HIDDEN, C], then W2
//              [C, HIDDEN] in pieces of 8 x 8, see pack of ops/fused_mlp.py; vectors float: b1, b2, V2: gamma, beta.
//              where MOMENTS, moments [M]: mean of each row of out, and sum of squared deviations from it.
//              V1's gamma and beta are in W1 and b1. W1 and b1 are halved: gelu takes half its argument
// math         fp32 sums, two-pass variance, hidden rounded to scalar_t; gelu to within that rounding
// grid         SPLIT == 0: as many blocks as run at once, or as there are tiles of 64 rows, which warpgroups walk over;
//              else SPLIT blocks, a cluster, a tile of ROWS rows. 128 GROUPS threads; shared memory see Plan there
// constants    scalar_t = __half | __nv_bfloat16; POST_NORM; MOMENTS, of V1; C % 32 == 0; HIDDEN % 64 == 0; GROUPS;
//              SPLIT == 0: CH columns of hidden at a time, PAIRS of such chunks of W1 and W2 in shared memory, A_SHARED:
//              rows, too; else ROWS % 8 == 0, ROWS % (2 SPLIT) == 0, HIDDEN % (16 SPLIT) == 0
// arch, bound  sm_90a; many rows: tensor cores and gelu, few: latency
#include "hopper.cuh"

static_assert(C % 32 == 0 && HIDDEN % 64 == 0 && !(POST_NORM && MOMENTS));

constexpr int THREADS = GROUPS * WARPGROUP, STEP = 16;  // STEP: of k, a product's

// Within 32 channels, place 16 s + 8 h + 2 q + e of W1's columns and W2's rows holds channel 8 q + 4 s + 2 h + e. So
// eight neighbours 8 q .. 8 q + 7 of a row, 16 bytes of memory, are what one thread of a fragment holds: word 2 s + h.

// What a descriptor is made of is the same in all lanes; told so, the compiler keeps it out of their registers.
DEVICE unsigned uniform(unsigned x) { return __shfl_sync(ALL_LANES, x, 0); }

// ---------------------------------------------------------------- many rows
//
// A warpgroup has 64 rows. For each chunk of hidden columns: s = b1 + LN(x) W1^T; h = gelu(s), in whose registers the
// next product expects its left operand; sum += h W2^T. V1's sum starts at x + b2. The warpgroups share the weights and
// drift apart, so that one's gelu runs under another's products.

template <typename T>
struct Walk {
    static constexpr int CHUNKS = HIDDEN / CH, BLOCK = CH * C;  // elements of a chunk of W1 or of W2
    static constexpr bool RESIDENT = PAIRS == CHUNKS, AHEAD = RESIDENT && !A_SHARED;  // AHEAD: fetch x a tile ahead
    static constexpr int TILE = A_SHARED || AHEAD ? 64 * C : 0;
    static constexpr int AT_X = 2 * PAIRS * BLOCK * 2, AT_B1 = AT_X + GROUPS * TILE * 2, AT_B2 = AT_B1 + HIDDEN * 8;
    static constexpr int AT_BARRIERS = AT_B2 + (POST_NORM ? 3 : 1) * C * 4;
    static_assert(SPLIT > 0 || RESIDENT || PAIRS > 2,
                  "a pair is fetched while another is read and the one before is let go");

    static DEVICE void run(const T* x, const T* weights, const float* vectors, T* out, float2* of_rows, int M,
                           float eps, unsigned char* shared) {
        const int lane = threadIdx.x % WARP, group = uniform(threadIdx.x / WARPGROUP), t = lane % 4;
        const int row = threadIdx.x % WARPGROUP / WARP * 16 + lane / 4;  // and row + 8
        const int tiles = ceil_div(M, 64), stride = gridDim.x * GROUPS;
        const int rounds = ceil_div(tiles - static_cast<int>(blockIdx.x), stride);
        const unsigned base = shared_address(shared), tile_at = base + AT_X + group * TILE * 2;
        T* const my_tile = reinterpret_cast<T*>(shared + AT_X) + group * TILE;
        const float* b1 = reinterpret_cast<const float*>(shared + AT_B1);
        const float* b2 = reinterpret_cast<const float*>(shared + AT_B2);
        auto* full = reinterpret_cast<unsigned long long*>(shared + AT_BARRIERS);
        auto *empty = full + PAIRS, *x_full = empty + PAIRS + group;

        auto fetch_pair = [&](int slot, int chunk) {
            barrier_expect(&full[slot], 4 * BLOCK);
            copy_bulk(shared + slot * 4 * BLOCK, weights + chunk * BLOCK, 2 * BLOCK, &full[slot]);
            copy_bulk(shared + (slot * 2 + 1) * 2 * BLOCK, weights + HIDDEN * C + chunk * BLOCK, 2 * BLOCK,
                      &full[slot]);
        };
        auto fetch_x = [&](int tile) {
            const unsigned bytes = min(64, M - tile * 64) * C * 2;
            barrier_expect(x_full, bytes);
            copy_bulk(my_tile, x + static_cast<size_t>(tile) * (64 * C), bytes, x_full);
        };
        if (threadIdx.x == 0) {
            for (int i = 0; i < PAIRS; ++i) barrier_init(&full[i], 1), barrier_init(&empty[i], GROUPS * 4);
            for (int i = 0; i < GROUPS; ++i) barrier_init(empty + PAIRS + i, 1);
            barrier_init_fence();
        }
        __syncthreads();
        let_next_kernel_start();
        if (threadIdx.x == 0)
            for (int i = 0; i < PAIRS; ++i) fetch_pair(i, i);
        for (int i = threadIdx.x; i < HIDDEN / 2; i += THREADS) {  // each pair twice: for a thread's two rows
            const float2 b = reinterpret_cast<const float2*>(vectors)[i];
            reinterpret_cast<float4*>(shared + AT_B1)[i] = make_float4(b.x, b.y, b.x, b.y);
        }
        for (int i = threadIdx.x; i < (POST_NORM ? 3 : 1) * C; i += THREADS)
            reinterpret_cast<float*>(shared + AT_B2)[i] = vectors[HIDDEN + i];
        wait_for_kernels_ahead();
        int tile = blockIdx.x + gridDim.x * group;
        if (AHEAD && threadIdx.x % WARPGROUP == 0 && tile < tiles) fetch_x(tile);
        __syncthreads();

        int slot = 0;
        unsigned phase = 0, x_phase = 0;
        for (int round = 0; round < rounds; ++round, tile += stride) {
            // This warp has read the pair. Thread 0 fills the slot before this one, which the others left long ago.
            auto next_pair = [&](int chunk) {
                if constexpr (!RESIDENT) {
                    if (lane == 0) barrier_arrive(&empty[slot]);
                    const int n = round * CHUNKS + chunk + PAIRS - 1;
                    if (threadIdx.x == 0 && n >= PAIRS && n < rounds * CHUNKS) {
                        const int last = slot ? slot - 1 : PAIRS - 1;
                        barrier_wait(&empty[last], slot ? phase : phase ^ 1);
                        fetch_pair(last, n % CHUNKS);
                    }
                }
                if (++slot == PAIRS) slot = 0, phase ^= RESIDENT ? 0 : 1;
            };
            if (tile >= tiles) {  // no rows left: keep the ring going
                for (int chunk = 0; chunk < (RESIDENT ? 0 : CHUNKS); ++chunk)
                    barrier_wait(&full[slot], phase), next_pair(chunk);
                continue;
            }

            // ---- rows: word 2 s + h of 32 channels G is sum[16 G + 8 s + 4 h ..], each row two of the four
            float sum[C / 2];
            unsigned a[A_SHARED ? 1 : C / STEP][4];
            const int m = tile * 64 + row;
            if (AHEAD) barrier_wait(x_full, x_phase), x_phase ^= 1;
            if (A_SHARED) named_barrier<WARPGROUP>(1 + group);  // the tile before has been read
#pragma unroll
            for (int G = 0; G < C / 32; ++G)
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const uint4 v = AHEAD
                                        ? *reinterpret_cast<const uint4*>(my_tile + (row + 8 * r) * C + G * 32 + t * 8)
                                        : load_now(x + static_cast<size_t>(min(m + 8 * r, M - 1)) * C + G * 32 + t * 8);
                    const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                    for (int w = 0; w < 4; ++w) {
                        if constexpr (POST_NORM) {  // the operand as it is
                            if constexpr (A_SHARED)
                                put(tile_at, row + 8 * r, 4 * G + w, t, words[w]);
                            else
                                a[2 * G + w / 2][w % 2 * 2 + r] = words[w];
                        } else {
                            const float2 f = unpack2<T>(words[w]);
                            sum[G * 16 + w * 4 + r * 2] = f.x, sum[G * 16 + w * 4 + r * 2 + 1] = f.y;
                        }
                    }
                }
            if (AHEAD) {
                named_barrier<WARPGROUP>(1 + group);
                if (threadIdx.x % WARPGROUP == 0 && tile + stride < tiles) fetch_x(tile + stride);
            }
            if constexpr (!POST_NORM) {
                float mean[2], rstd[2];
                norms(sum, mean, rstd, eps);
#pragma unroll
                for (int i = 0; i < C / 4; ++i) {
                    const int G = i / 8, w = i / 2 % 4, r = i % 2;
                    const float *f = sum + G * 16 + w * 4 + r * 2, shift = -mean[r] * rstd[r];
                    const unsigned word = round2<T>(fmaf(f[0], rstd[r], shift), fmaf(f[1], rstd[r], shift));
                    if constexpr (A_SHARED)
                        put(tile_at, row + 8 * r, 4 * G + w, t, word);
                    else
                        a[2 * G + w / 2][w % 2 * 2 + r] = word;
                }
            }
            if (A_SHARED) fence_for_async(), named_barrier<WARPGROUP>(1 + group);
#pragma unroll
            for (int i = 0; i < C / 4; i += 2) {  // b2, read for each row: a copied register would be waited for, C7518
                const float4 b = load_shared4(b2 + i / 8 * 32 + t * 8 + i / 2 % 2 * 4);
                float* f = sum + i / 8 * 16 + i / 2 % 2 * 8 + i / 4 % 2 * 2;
                if constexpr (POST_NORM)
                    f[0] = b.x, f[1] = b.y, f[4] = b.z, f[5] = b.w;
                else
                    f[0] += b.x, f[1] += b.y, f[4] += b.z, f[5] += b.w;
            }

            // ---- chunks
            float s[CH / 2];
            unsigned h[CH / STEP][4];
            auto start = [&](int chunk) {
#pragma unroll
                for (int i = 0; i < CH / 8; ++i) {
                    const float4 b = load_shared4(b1 + chunk * (CH * 2) + i * 16 + t * 4);
                    s[4 * i] = b.x, s[4 * i + 1] = b.y, s[4 * i + 2] = b.z, s[4 * i + 3] = b.w;
                }
            };
            auto up = [&](int slot) {  // s += a W1^T
                const auto w1 = descriptor_plain(uniform(base + slot * 4 * BLOCK), 128, C * 16);
                const auto rows = descriptor_plain(uniform(tile_at), 1024, 128);
                hold(s);
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < C / STEP; ++k)
                    if constexpr (A_SHARED)
                        wgmma<T>(s, rows + k * 128, w1 + k * 16);
                    else
                        wgmma<T>(s, a[k], w1 + k * 16);
                wgmma_commit();
            };
            auto activate = [&] {
#pragma unroll
                for (int i = 0; i < CH / 4; ++i)
                    h[i / 4][i % 4] = round2<T>(gelu_of_twice(s[2 * i]), gelu_of_twice(s[2 * i + 1]));
            };
            auto down = [&](int slot) {  // sum += h W2^T
                const auto w2 = descriptor_plain(uniform(base + (slot * 2 + 1) * 2 * BLOCK), C * 16, 128);
#pragma unroll
                for (int k = 0; k < CH / STEP; ++k) hold(h[k]);
                hold(sum);
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < CH / STEP; ++k) wgmma<T>(sum, h[k], w2 + k * 2 * C);
                wgmma_commit();
            };
            auto finish = [&] {
                wgmma_wait<0>();
                hold(s);
#pragma unroll
                for (int k = 0; k < CH / STEP; ++k) hold(h[k]);
            };
            start(0);
            barrier_wait(&full[slot], phase);
            up(slot);
            if constexpr (RESIDENT) {  // a chunk's second product goes with the next one's first
#pragma unroll 1
                for (int chunk = 1; chunk < CHUNKS; ++chunk) {
                    finish();
                    activate();
                    start(chunk);
                    if (round == 0) barrier_wait(&full[chunk], 0);
                    down(chunk - 1);
                    up(chunk);
                }
                finish();
                activate();
                down(CHUNKS - 1);
                wgmma_wait<0>();
                hold(sum);
            } else {  // the registers don't suffice for that
#pragma unroll 1
                for (int chunk = 1; chunk < CHUNKS; ++chunk) {
                    finish();
                    activate();
                    down(slot);
                    wgmma_wait<0>();
                    hold(sum);
                    next_pair(chunk - 1);
                    start(chunk);
                    barrier_wait(&full[slot], phase);
                    up(slot);
                }
                finish();
                activate();
                down(slot);
                wgmma_wait<0>();
                hold(sum);
                next_pair(CHUNKS - 1);
            }

            // ---- out
            if constexpr (POST_NORM) {  // x is the first product's operand, still there
                float mean[2], rstd[2];
                norms(sum, mean, rstd, eps);
#pragma unroll
                for (int i = 0; i < C / 4; i += 2) {
                    const int G = i / 8, w = i / 4 % 2 * 2, r = i / 2 % 2;
                    const float4 gamma = load_shared4(b2 + C + G * 32 + t * 8 + w * 2);
                    const float4 beta = load_shared4(b2 + 2 * C + G * 32 + t * 8 + w * 2);
                    const float2 from[2] = {unpack2<T>(word_of_x(a, tile_at, row, t, G, w, r)),
                                            unpack2<T>(word_of_x(a, tile_at, row, t, G, w + 1, r))};
                    float* f = sum + G * 16 + w * 4 + r * 2;
                    f[0] = fmaf((f[0] - mean[r]) * rstd[r], gamma.x, beta.x) + from[0].x;
                    f[1] = fmaf((f[1] - mean[r]) * rstd[r], gamma.y, beta.y) + from[0].y;
                    f[4] = fmaf((f[4] - mean[r]) * rstd[r], gamma.z, beta.z) + from[1].x;
                    f[5] = fmaf((f[5] - mean[r]) * rstd[r], gamma.w, beta.w) + from[1].y;
                }
            }
#pragma unroll
            for (int G = 0; G < C / 32; ++G)
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const float* f = sum + G * 16 + r * 2;
                    if (m + 8 * r < M)
                        *reinterpret_cast<uint4*>(out + static_cast<size_t>(m + 8 * r) * C + G * 32 + t * 8) =
                            make_uint4(round2<T>(f[0], f[1]), round2<T>(f[4], f[5]), round2<T>(f[8], f[9]),
                                       round2<T>(f[12], f[13]));
                }
            if constexpr (MOMENTS) {
                float mean[2], squares[2];
                moments(sum, mean, squares);
#pragma unroll
                for (int r = 0; r < 2; ++r)
                    if (t == 0 && m + 8 * r < M) of_rows[m + 8 * r] = make_float2(mean[r], squares[r]);
            }
        }
    }

    // Word w of 32 channels G of this thread's row r, as the left operand has it.
    template <int K>
    static DEVICE unsigned word_of_x(const unsigned (&a)[K][4], unsigned tile_at, int row, int t, int G, int w, int r) {
        if constexpr (!A_SHARED) return a[2 * G + w / 2][w % 2 * 2 + r];
        return load_shared(tile_at + (4 * G + w) * 1024 + (row + 8 * r) * 16 + t * 4);
    }
    // Two channels of a row into the left operand in shared memory.
    static DEVICE void put(unsigned tile_at, int row, int k8, int q, unsigned word) {
        store_shared(tile_at + k8 * 1024 + row * 16 + q * 4, word);
    }

    // Mean, and sum of squared deviations from it, of this thread's two rows, which four lanes share.
    static DEVICE void moments(const float (&f)[C / 2], float (&mean)[2], float (&squares)[2]) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float a = 0, b = 0;  // two chains
#pragma unroll
            for (int i = 0; i < C / 8; ++i) a += f[4 * i + 2 * r], b += f[4 * i + 2 * r + 1];
            mean[r] = warp_sum<4>(a + b) * (1.0f / C);
            a = b = 0;
#pragma unroll
            for (int i = 0; i < C / 8; ++i) {
                const float d = f[4 * i + 2 * r] - mean[r], e = f[4 * i + 2 * r + 1] - mean[r];
                a = fmaf(d, d, a), b = fmaf(e, e, b);
            }
            squares[r] = warp_sum<4>(a + b);
        }
    }
    // The same mean, and 1 / deviation.
    static DEVICE void norms(const float (&f)[C / 2], float (&mean)[2], float (&rstd)[2], float eps) {
        moments(f, mean, rstd);
#pragma unroll
        for (int r = 0; r < 2; ++r) rstd[r] = rsqrtf(rstd[r] * (1.0f / C) + eps);
    }
};

// ---------------------------------------------------------------- few rows
//
// A cluster has ROWS rows, each of its blocks PART columns of hidden, transposed: hidden^T = gelu(W1 LN(x)^T + b1) and
// sums^T = W2 hidden^T have the weights on the left, 64 rows a warpgroup, and on the right as few rows of x as wanted.
// Each block sends the others their rows' sums and adds up, in the order of the blocks, what it got for its own.

template <typename T, int SPLIT>
struct Share {
    static constexpr int PART = HIDDEN / SPLIT, CHUNKS = ceil_div(PART, 64), OUTS = ceil_div(C, 64);
    static constexpr int PAIRS_EACH = ROWS / 2 / SPLIT;  // pairs of rows that a block finishes
    static constexpr int WARPS = THREADS / WARP, WANTED = ceil_div(C / 4, WARP);
    static constexpr int WARPS_EACH = PAIRS_EACH * WANTED <= WARPS ? WANTED : 1;  // that finish a pair of rows
    static constexpr int QUADS = ceil_div(WANTED, WARPS_EACH);                    // of channels, a lane
    static constexpr int W1_BYTES = PART * C * 2, X_BYTES = ROWS * C * 2, SUM_BYTES = ROWS * C * 4;
    // where C is no multiple of 64, W2's last rows are read past its end
    static constexpr int H_BYTES = ROWS * PART * 2 > 1024 ? ROWS * PART * 2 : 1024;
    static constexpr int AT_X = W1_BYTES, AT_W2 = W1_BYTES + X_BYTES, AT_H = AT_W2 + W1_BYTES;
    static constexpr int B1_BYTES = (CHUNKS * 64 > 4 * WARPS ? CHUNKS * 64 : 4 * WARPS) * 4;  // later sums of rows
    static constexpr int AT_B1 = AT_H + H_BYTES, AT_B2 = AT_B1 + B1_BYTES;
    static constexpr int AT_BARRIERS = AT_B2 + (POST_NORM ? 3 : 1) * C * 4;
    static constexpr int LANES = C % 128 == 0 && ROWS * 16 <= THREADS ? 16 : C % 64 == 0 && ROWS * 8 <= THREADS ? 8 : 4;
    static_assert(HIDDEN % (SPLIT * STEP) == 0 && ROWS % (2 * SPLIT) == 0 && ROWS % 8 == 0 && ROWS * 4 <= THREADS);
    static_assert(SUM_BYTES <= AT_W2, "sums that arrive take the place of W1 and x");

    static DEVICE void run(const T* x, const T* weights, const float* vectors, T* out, float2* of_rows, int M,
                           float eps, unsigned char* shared) {
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, group = uniform(warp / 4), g = lane / 4,
                  t = lane % 4;
        const unsigned rank = SPLIT > 1 ? cluster_rank() : 0, base = shared_address(shared);
        const int first = blockIdx.x / SPLIT * ROWS;
        float* const b1 = reinterpret_cast<float*>(shared + AT_B1);
        float* const b2 = reinterpret_cast<float*>(shared + AT_B2);
        auto* full = reinterpret_cast<unsigned long long*>(shared + AT_BARRIERS);
        auto *full2 = full + CHUNKS, *sums_full = full2 + CHUNKS;

        auto fetch = [&](int which, int at, unsigned long long* barriers) {  // this block's part of W1 or W2
            const T* from = weights + which * (HIDDEN * C) + rank * (PART * C);
            for (int i = 0; i < CHUNKS; ++i) {
                const int bytes = min(64, PART - i * 64) * C * 2;
                barrier_expect(&barriers[i], bytes);
                copy_bulk(shared + at + i * 64 * C * 2, from + i * 64 * C, bytes, &barriers[i]);
            }
        };
        if (threadIdx.x == 0) {
            for (int i = 0; i < 2 * CHUNKS + 1; ++i) barrier_init(&full[i], 1);
            barrier_init_fence();
            barrier_expect(sums_full, SUM_BYTES / SPLIT * (SPLIT - 1));
        }
        let_next_kernel_start();
        for (int i = threadIdx.x; i < PART; i += THREADS) b1[i] = vectors[rank * PART + i];
        for (int i = threadIdx.x; i < (POST_NORM ? 3 : 1) * C; i += THREADS) b2[i] = vectors[HIDDEN + i];
        if (threadIdx.x == 0) fetch(0, 0, full);  // after the loads above, which would queue up behind it
        wait_for_kernels_ahead();

        // ---- rows of x, normalised, as a right operand
        constexpr int PACKS = C / 8 / LANES;
        const int row = threadIdx.x / LANES, l = threadIdx.x % LANES;
        uint4 packs[PACKS];
#pragma unroll
        for (int i = 0; i < PACKS; ++i)
            packs[i] = row < ROWS && first + row < M
                           ? load_now(x + static_cast<size_t>(first + row) * C + (l + LANES * i) * 8)
                           : make_uint4(0, 0, 0, 0);
        if (threadIdx.x == 0) fetch(1, AT_W2, full2);  // after x, which is needed first
        if (row < ROWS) {
            float f[PACKS][8], sum = 0, squares = 0;
#pragma unroll
            for (int i = 0; i < PACKS; ++i) {
                const unsigned words[4] = {packs[i].x, packs[i].y, packs[i].z, packs[i].w};
#pragma unroll
                for (int w = 0; w < 4; ++w) {
                    const float2 v = unpack2<T>(words[w]);
                    f[i][2 * w] = v.x, f[i][2 * w + 1] = v.y;
                    sum += v.x + v.y;
                }
            }
            float mean = 0, rstd = 1;
            if constexpr (!POST_NORM) {
                mean = warp_sum<LANES>(sum) * (1.0f / C);
#pragma unroll
                for (int i = 0; i < PACKS * 8; ++i)
                    squares = fmaf(f[i / 8][i % 8] - mean, f[i / 8][i % 8] - mean, squares);
                rstd = rsqrtf(warp_sum<LANES>(squares) * (1.0f / C) + eps);
            }
#pragma unroll
            for (int i = 0; i < PACKS; ++i) {
                const int pack = l + LANES * i;
                const unsigned at = base + AT_X + (pack / 4 * 4 * ROWS + row) * 16 + pack % 4 * 4;
#pragma unroll
                for (int w = 0; w < 4; ++w)
                    store_shared(at + w * ROWS * 16,
                                 round2<T>((f[i][2 * w] - mean) * rstd, (f[i][2 * w + 1] - mean) * rstd));
            }
        }
        fence_for_async();
        __syncthreads();

        // ---- hidden
        float d[ROWS / 2];
        for (int chunk = group; chunk < CHUNKS; chunk += GROUPS) {
            const int h = chunk * 64 + warp % 4 * 16;
            const auto w1 = descriptor_plain(uniform(base + chunk * 64 * C * 2), 128, C * 16);
            const auto right = descriptor_plain(base + AT_X, ROWS * 16, 128);
#pragma unroll
            for (int i = 0; i < ROWS / 2; ++i) d[i] = b1[h + g + i % 4 / 2 * 8];
            barrier_wait(&full[chunk], 0);
            hold(d);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < C / STEP; ++k) wgmma<T>(d, w1 + k * 16, right + k * 2 * ROWS);
            wgmma_commit();
            wgmma_wait<0>();
            hold(d);
            if (h < PART) {
                const unsigned at = base + AT_H + ((h / 8 + lane / 8 % 2) * ROWS + lane % 8) * 16;
#pragma unroll
                for (int j = 0; j < ROWS / 8; ++j)
                    store_matrix_x2_trans(at + j * 128, round2<T>(gelu_of_twice(d[4 * j]), gelu_of_twice(d[4 * j + 1])),
                                          round2<T>(gelu_of_twice(d[4 * j + 2]), gelu_of_twice(d[4 * j + 3])));
            }
        }
        fence_for_async();
        __syncthreads();
        if constexpr (SPLIT > 1) cluster_arrive_relaxed();  // W1 and x have been read: sums may come

        // ---- sums, each to the block that finishes its row
        for (int o = group; o < OUTS; o += GROUPS) {
            const auto w2 = descriptor_plain(uniform(base + AT_W2 + o * 1024), C * 16, 128);
            const auto right = descriptor_plain(base + AT_H, ROWS * 16, 128);
            if (o == group)
                for (int i = 0; i < CHUNKS; ++i) barrier_wait(&full2[i], 0);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < PART / STEP; ++k) {
                if (k == 0)
                    wgmma_first<T>(d, w2, right);
                else
                    wgmma<T>(d, w2 + k * 2 * C, right + k * 2 * ROWS);
            }
            wgmma_commit();
            if constexpr (SPLIT > 1)
                if (o == group) cluster_wait();
            wgmma_wait<0>();
            hold(d);
            const int c16 = o * 4 + warp % 4;
            if (c16 >= C / 16) continue;
#pragma unroll
            for (int j = 0; j < ROWS / 8; ++j) {
                const int pair = j * 4 + t, owner = pair / PAIRS_EACH;
                const int at = ((rank * PAIRS_EACH + pair % PAIRS_EACH) * (C / 16) + c16) * 128 + g * 16;
                const float* f = d + 4 * j;
                if (SPLIT == 1 || owner == rank)
                    *reinterpret_cast<float4*>(shared + at) = make_float4(f[0], f[1], f[2], f[3]);
                else
                    store_async_in_block(address_in_block(base + at, owner), f[0], f[1], f[2], f[3],
                                         address_in_block(shared_address(sums_full), owner));
            }
        }
        if constexpr (SPLIT > 1)
            if (group >= OUTS) cluster_wait();

        // ---- out: WARPS_EACH warps have two rows, a lane four channels of both at a time
        __syncthreads();  // this block's own sums are there
        for (int item = warp; item < ceil_div(PAIRS_EACH * WARPS_EACH, WARPS) * WARPS; item += WARPS) {
            const int slot = item / WARPS_EACH, m = first + (rank * PAIRS_EACH + slot) * 2;
            const int from_quad = slot < PAIRS_EACH ? item % WARPS_EACH * WARP + lane : C;  // C: none
            uint2 residual[QUADS][2];
            float f[QUADS][2][4];
            auto quad = [&](int i) { return from_quad + WARP * i; };
#pragma unroll
            for (int i = 0; i < QUADS; ++i)
#pragma unroll
                for (int r = 0; r < 2; ++r)
                    if (quad(i) < C / 4 && m + r < M)
                        residual[i][r] = load_now8(x + static_cast<size_t>(m + r) * C + channel(quad(i)));
            if constexpr (SPLIT > 1) barrier_wait_cluster(sums_full, 0);
#pragma unroll
            for (int i = 0; i < QUADS; ++i) {
                const int u = quad(i);
                if (u < C / 4) {
                    const float4 b = load_shared4(b2 + channel(u));
#pragma unroll
                    for (int r = 0; r < 2; ++r) f[i][r][0] = b.x, f[i][r][1] = b.y, f[i][r][2] = b.z, f[i][r][3] = b.w;
#pragma unroll
                    for (int from = 0; from < SPLIT; ++from) {
                        const float* p =
                            reinterpret_cast<const float*>(shared) + ((from * PAIRS_EACH + slot) * (C / 4) + u) * 8;
                        const float4 v = load_shared4(p), w = load_shared4(p + 4);
                        f[i][0][0] += v.x, f[i][1][0] += v.y, f[i][0][2] += v.z, f[i][1][2] += v.w;
                        f[i][0][1] += w.x, f[i][1][1] += w.y, f[i][0][3] += w.z, f[i][1][3] += w.w;
                    }
                }
            }
            if constexpr (POST_NORM) {
                float mean[2], squares[2];
                moments(f, from_quad, warp, b1, mean, squares);
#pragma unroll
                for (int i = 0; i < QUADS; ++i)
                    if (quad(i) < C / 4) {
                        const float *gamma = b2 + C + channel(quad(i)), *beta = gamma + C;
#pragma unroll
                        for (int r = 0; r < 2; ++r)
#pragma unroll
                            for (int k = 0; k < 4; ++k)
                                f[i][r][k] = fmaf((f[i][r][k] - mean[r]) * rsqrtf(squares[r] * (1.0f / C) + eps),
                                                  gamma[k], beta[k]);
                    }
            }
#pragma unroll
            for (int i = 0; i < QUADS; ++i)
#pragma unroll
                for (int r = 0; r < 2; ++r)
                    if (quad(i) < C / 4 && m + r < M) {
                        const float2 v = unpack2<T>(residual[i][r].x), w = unpack2<T>(residual[i][r].y);
                        f[i][r][0] += v.x, f[i][r][1] += v.y, f[i][r][2] += w.x, f[i][r][3] += w.y;
                        *reinterpret_cast<uint2*>(out + static_cast<size_t>(m + r) * C + channel(quad(i))) =
                            make_uint2(round2<T>(f[i][r][0], f[i][r][1]), round2<T>(f[i][r][2], f[i][r][3]));
                    }
            if constexpr (MOMENTS) {
                float mean[2], squares[2];
                moments(f, from_quad, warp, b1, mean, squares);
#pragma unroll
                for (int r = 0; r < 2; ++r)
                    if (from_quad == 0 && m + r < M) of_rows[m + r] = make_float2(mean[r], squares[r]);
            }
        }
    }

    // Mean, and sum of squared deviations from it, of two rows, of which this lane has fours from here on.
    static DEVICE void moments(const float (&f)[QUADS][2][4], int from_quad, int warp, float* shared, float (&mean)[2],
                               float (&squares)[2]) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            mean[r] = 0;
#pragma unroll
            for (int i = 0; i < QUADS; ++i)
                if (from_quad + WARP * i < C / 4) mean[r] += f[i][r][0] + f[i][r][1] + f[i][r][2] + f[i][r][3];
        }
        sum_of_rows(mean, shared, warp);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            mean[r] *= 1.0f / C, squares[r] = 0;
#pragma unroll
            for (int i = 0; i < QUADS; ++i)
#pragma unroll
                for (int k = 0; k < 4; ++k)
                    if (from_quad + WARP * i < C / 4)
                        squares[r] = fmaf(f[i][r][k] - mean[r], f[i][r][k] - mean[r], squares[r]);
        }
        sum_of_rows(squares, shared + 2 * WARPS, warp);
    }
    // Sums over the warps that share two rows, at the same place in each's array of WARPS.
    static DEVICE void sum_of_rows(float (&sum)[2], float* shared, int warp) {
#pragma unroll
        for (int r = 0; r < 2; ++r) sum[r] = warp_sum(sum[r]);
        if constexpr (WARPS_EACH > 1) {
            if (threadIdx.x % WARP == 0) shared[warp] = sum[0], shared[WARPS + warp] = sum[1];
            __syncthreads();
            shared += warp / WARPS_EACH * WARPS_EACH;
            sum[0] = sum[1] = 0;
#pragma unroll
            for (int i = 0; i < WARPS_EACH; ++i) sum[0] += shared[i], sum[1] += shared[WARPS + i];
        }
    }

    // First of the four channels that quad u of a row's sums holds: places 2 q, 2 q + 1 of eight, in two of eights.
    static DEVICE int channel(int u) { return u / 8 * 32 + u % 4 * 8 + u / 4 % 2 * 4; }
};

template <typename T, int SPLIT, typename... Args>
DEVICE void run(Args... args) {
    if constexpr (SPLIT == 0)
        Walk<T>::run(args...);
    else
        Share<T, SPLIT>::run(args...);
}

constexpr int CLUSTER = SPLIT > 0 ? SPLIT : 1;

extern "C" __global__ void __launch_bounds__(THREADS, 1) __cluster_dims__(CLUSTER, 1, 1)
    mlp_block(const scalar_t* x, const scalar_t* __restrict__ weights, const float* __restrict__ vectors, scalar_t* out,
              float2* moments, int M, float eps) {
    extern __shared__ __align__(128) unsigned char shared[];
    run<scalar_t, SPLIT>(x, weights, vectors, out, moments, M, eps, shared);
}
