// attention_block   out = x + b + sum_h P_h V_h Wproj_h^T,  P_h = softmax_j(q_ih . k_jh + B[h,i,j] + mask_ij)
//                   (q|k|v) = LN(x) Wqkv^T + bqkv; or, COSINE, out = x + LN(b + sum_h ..) gamma + beta with (q|k|v) =
//                   x Wqkv^T + bqkv, q scale_h/|q| and k/|k|; over tokens i, j of a shifted window of WINDOW x WINDOW
// shapes       x, out [B, H, W, C] scalar_t (out may be x), H and W multiples of WINDOW; position_bias
//              [HEADS, 4, 4, 32, 8] half, image and vectors as ops/fused_attention.py prepares and packs them: gamma,
//              beta, scales, log2 e and v's bias are in them
// windows      are index arithmetic, and so is the mask: no row is moved in global memory
// math         products by wgmma, sums in float32; q, k, v, P and the heads' results are rounded to scalar_t between
// one window   is the first N rows of a tile of 64. Its channels lie in shared memory as slabs of 32, whose rows are 64
//              bytes, 64-byte swizzle: what wgmma reads, and pieces of 16 bytes that threads own. Of each slab a thread
//              has piece lane % 4 of its two accumulator rows, as x, as LN(x), as the result: the rows of Wproj are
//              permuted to that end
// grid         clusters of CLUSTER blocks, up to what a GPU holds; a block of GROUPS warpgroups takes one window after
//              the other. SPLIT warpgroups share a window: each has HEADS / SPLIT heads, and as many columns of the
//              result once all have written their heads' results into shared memory, that of the cluster's other blocks
//              too. Of a block these are a team; a block has one or several, for a window each, which share weights
// constants    scalar_t = __half | __nv_bfloat16; C % 32 == 0; WINDOW = 7 | 8; COSINE; GROUPS; SPLIT; CLUSTER;
//              RESIDENT: all weights stay in shared memory, else slots for one or two heads' of each of a team;
//              TILES of a team: 2 keep x, and of warpgroups that do not share, take the next one early;
//              A_REGISTERS: LN(x) in registers; KV_BUFFERS for k and v; BIAS_SHARED: position_bias in shared memory;
//              PIPELINED: a head's product with Wqkv runs during the softmax of the one before
// arch, bound  sm_90a; latency of a window's chain of products, softmax and barriers
#include "attention.cuh"

constexpr int N = WINDOW * WINDOW, KEYS = N <= 56 ? 56 : 64;
constexpr int HEADS = C / 32, SLABS = C / 32, STEPS = C / 16;
constexpr bool ALONE = SPLIT == 1;                            // a warpgroup has its windows for itself
constexpr int TEAM = SPLIT / CLUSTER, TEAMS = GROUPS / TEAM;  // warpgroups of a block that share a window; windows
constexpr int OWN = HEADS / SPLIT;                            // heads of a warpgroup
constexpr int BLOCK_HEADS = HEADS / CLUSTER;                  // heads of a block
constexpr int WIDTH = 32 * OWN;                               // columns of the result of a warpgroup,
constexpr int COLUMNS = WIDTH % 96 == 0 ? 96 : WIDTH % 64 == 0 ? 64 : 32, PARTS = WIDTH / COLUMNS;  // in parts
constexpr int CHUNKS = OWN + PARTS;                // pieces of the weights that a warpgroup needs in turn
constexpr int SLOTS = ALONE || PIPELINED ? 2 : 1;  // for them, of each of a team, where not all weights are RESIDENT
constexpr bool BIAS_EARLY =                        // where it has the registers
    ALONE ? !BIAS_SHARED && C * GROUPS <= 384 : TEAMS == 1 || C == 128 || (C == 192 && KEYS == 56);
constexpr int FETCHERS = TEAM == 1 ? 2 : 1;  // rows of x that a thread fetches and normalises

constexpr int SLAB = 64 * 64, TILE = SLABS * SLAB, KV = 2 * SLAB;  // bytes
constexpr int HEAD = 96 * C * 2, PART = COLUMNS * C * 2;           // weights of a head's q, k, v; of COLUMNS of Wproj
constexpr int BIAS = 4 * 4 * 32 * 8 * 2;                           // a head's bias
constexpr int VECTORS = COSINE ? 5 * C + ceil_div(HEADS, 4) * 4 : 2 * C;
enum Vector { Q_BIAS = 0, K_BIAS = C, PROJ_BIAS = COSINE ? 2 * C : C, GAMMA = 3 * C, BETA = 4 * C, SCALE = 5 * C };

constexpr int PROJ_AT = BLOCK_HEADS * HEAD;
constexpr int TILES_AT = RESIDENT ? PROJ_AT + BLOCK_HEADS * 32 * C * 2 : TEAM * SLOTS * HEAD;
constexpr int KV_AT = TILES_AT + TEAMS * TILES * TILE;
constexpr int BIAS_AT = KV_AT + GROUPS * KV_BUFFERS * KV;
constexpr int STATS_AT = BIAS_AT + (BIAS_SHARED ? BLOCK_HEADS * BIAS : 0);
constexpr int VECTORS_AT = STATS_AT + (COSINE && !ALONE ? TEAMS * SPLIT * 64 * 8 : 0);
constexpr int MASKS_AT = VECTORS_AT + 4 * VECTORS;
constexpr int BARRIERS_AT = MASKS_AT + 2 * WARPGROUP * 4;
constexpr int WEIGHT_BARRIERS = RESIDENT ? BLOCK_HEADS + 1 : TEAM * SLOTS;
static_assert(C % 32 == 0 && HEADS % SPLIT == 0 && SPLIT % CLUSTER == 0 && GROUPS % TEAM == 0);
static_assert((WINDOW == 7 || WINDOW == 8) && (ALONE || !A_REGISTERS));
static_assert(CLUSTER == 1 || (TEAMS == 1 && RESIDENT));
static_assert(RESIDENT || (PART <= HEAD && CHUNKS % (2 * SLOTS) == 0));  // a chunk's slot and parity stay the same

extern "C" __global__ void __launch_bounds__(WARPGROUP* GROUPS, 1) __cluster_dims__(CLUSTER, 1, 1)
    attention_block(const scalar_t* x, const scalar_t* image, const float* vectors, const __half* position_bias,
                    scalar_t* out, int H, int W, int windows, int shift_h, int shift_w, float eps) {
    extern __shared__ __align__(1024) unsigned char shared[];
    unsigned thread = threadIdx.x;
    auto lane = [&] { return thread % 32; };
    auto warp = [&] { return thread / 32 % 4; };  // of the warpgroup: it has rows 16 warp + ..
    const unsigned group = __shfl_sync(ALL_LANES, threadIdx.x / WARPGROUP, 0);  // the compiler sees that it is uniform
    const unsigned team = group / TEAM, member = group % TEAM;
    unsigned long long* barriers = reinterpret_cast<unsigned long long*>(shared + BARRIERS_AT);
    unsigned* releases = reinterpret_cast<unsigned*>(barriers + WEIGHT_BARRIERS + 1);
    const float* vector = reinterpret_cast<const float*>(shared + VECTORS_AT);
    const unsigned* masks = reinterpret_cast<const unsigned*>(shared + MASKS_AT);
    const unsigned rank = CLUSTER > 1 ? cluster_rank() : 0;

    // ---- windows: number, rows in global memory, edges
    const int blocks = gridDim.x / CLUSTER, block = blockIdx.x / CLUSTER, step = blocks * TEAMS;
    int rounds = ceil_div(ceil_div(windows - block, blocks), TEAMS);  // that are left
    int window = block + team * blocks;

    // Rows of x of two tokens of a window, and in the high bits of the first on which edges the window lies where the
    // shift made two regions of it: the last row of windows, the last column.
    struct Rows {
        unsigned row[2];
    };
    constexpr unsigned LAST_Y = 1u << 30, LAST_X = 1u << 31, ROW = LAST_Y - 1;
    auto locate = [&](int window, unsigned token0, unsigned token1) {
        unsigned h = H, w = W;
        forget_origin(h), forget_origin(w);
        const unsigned across = w / WINDOW, down = h / WINDOW;
        const unsigned line = window / across, column = window - line * across, image = line / down;
        const unsigned y0 = (line - image * down) * WINDOW, x0 = column * WINDOW;
        auto row = [&](unsigned token) {
            token = min(token, N - 1u);
            unsigned y = y0 + token / WINDOW + shift_h, x = x0 + token % WINDOW + shift_w;
            y -= y >= h ? h : 0, x -= x >= w ? w : 0;
            return (image * h + y) * w + x;
        };
        Rows found{row(token0), row(token1)};
        if (shift_h > 0 && y0 + WINDOW == h) found.row[0] |= LAST_Y;
        if (shift_w > 0 && x0 + WINDOW == w) found.row[0] |= LAST_X;
        return found;
    };
    auto token = [&](unsigned i) { return 16 * warp() + 8 * i + lane() / 4; };  // of accumulator row i of a thread
    auto place = [&](int window) { return locate(window, token(0), token(1)); };

    // ---- x: where a row's pieces lie in a slab; each thread fetches those that it will normalise
    auto fetched = [&](unsigned i) { return TEAM == 1 ? token(i) : 8 * (4 * member + warp()) + lane() / 4; };
    auto fetches = [&] { return TEAM <= 2 || member < 2; };
    auto piece_of = [&](unsigned row) { return row * 64 + ((lane() % 4 ^ lane() / 8) << 4); };  // row % 8 == lane / 4
    auto fetch = [&](const Rows& rows, unsigned tile) {
        if (fetches()) {
#pragma unroll
            for (unsigned i = 0; i < FETCHERS; ++i) {
                const scalar_t* from = x + size_t(rows.row[i] & ROW) * C + lane() % 4 * 8;
#pragma unroll
                for (int s = 0; s < SLABS; ++s)
                    copy_async16(shared + tile + piece_of(fetched(i)) + s * SLAB, from + s * 32, fetched(i) < N);
            }
        }
        copy_async_commit();
    };

    // ---- weights: of each head, then of each part of the result; and again for the next window
    const scalar_t* projection = image + HEADS * (HEAD / 2);
    auto send = [&](unsigned member, int chunk) {  // one thread: to where this member of all teams will look for it
        const unsigned slot = member * SLOTS + chunk % SLOTS;
        unsigned char* to = shared + slot * HEAD;
        barrier_expect(&barriers[slot], chunk < OWN ? HEAD : PART);
        if (chunk < OWN) {
            copy_bulk(to, image + (chunk * TEAM + member) * (HEAD / 2), HEAD, &barriers[slot]);
        } else {
#pragma unroll 1
            for (int s = 0; s < SLABS; ++s)
                copy_bulk(to + s * COLUMNS * 64, projection + (s * C + (member * PARTS + chunk - OWN) * COLUMNS) * 32,
                          COLUMNS * 64, &barriers[slot]);
        }
    };
    unsigned weights = 0;
    auto acquire = [&](int chunk) -> unsigned {  // where it is, once it is there
        forget_origin(weights);                  // as below
        if constexpr (RESIDENT) {
            const unsigned head = chunk * TEAM + member;
            barrier_wait(&barriers[chunk < OWN ? head : BLOCK_HEADS], 0);
            return weights + (chunk < OWN ? head * HEAD : PROJ_AT + (member * PARTS + chunk - OWN) * COLUMNS * 64);
        } else {
            const unsigned slot = member * SLOTS + chunk % SLOTS;
            barrier_wait(&barriers[slot], chunk / SLOTS % 2);
            return weights + slot * HEAD;
        }
    };
    auto release = [&](int chunk) {
        if constexpr (!RESIDENT) {
            if (lane() == 0) {  // the last warp that was to read it sends for what comes next in its slot
                const unsigned slot = member * SLOTS + chunk % SLOTS;
                if (count_shared(&releases[slot]) == 4 * TEAMS - 1) {
                    releases[slot] = 0;
                    if (chunk + SLOTS < CHUNKS || rounds > 1) send(member, (chunk + SLOTS) % CHUNKS);
                }
            }
            __syncwarp();
        }
    };

    // ---- what does not depend on kernels ahead
    if (thread == 0) {
        for (int i = 0; i <= WEIGHT_BARRIERS; ++i) barrier_init(&barriers[i], 1);
        barrier_init_fence();
        unsigned long long* tables = &barriers[WEIGHT_BARRIERS];
        barrier_expect(tables, 4 * VECTORS + (BIAS_SHARED ? BLOCK_HEADS * BIAS : 0));
        copy_bulk(shared + VECTORS_AT, vectors, 4 * VECTORS, tables);
        if constexpr (RESIDENT) {
            for (int h = 0; h < BLOCK_HEADS; ++h) {
                barrier_expect(&barriers[h], HEAD);
                copy_bulk(shared + h * HEAD, image + (rank * BLOCK_HEADS + h) * (HEAD / 2), HEAD, &barriers[h]);
            }
            barrier_expect(&barriers[BLOCK_HEADS], BLOCK_HEADS * 32 * C * 2);
            for (int s = 0; s < SLABS; ++s)
                copy_bulk(shared + PROJ_AT + s * BLOCK_HEADS * 2048,
                          projection + (s * C + rank * BLOCK_HEADS * 32) * 32, BLOCK_HEADS * 2048,
                          &barriers[BLOCK_HEADS]);
        } else {
            for (int slot = 0; slot < TEAM * SLOTS; ++slot) releases[slot] = 0;
            for (int slot = 0; slot < TEAM * SLOTS; ++slot) send(slot / SLOTS, slot % SLOTS);
        }
        if constexpr (BIAS_SHARED)
            copy_bulk(shared + BIAS_AT, position_bias + rank * BLOCK_HEADS * (BIAS / 2), BLOCK_HEADS * BIAS, tables);
    }
    if ((shift_h | shift_w) && thread < WARPGROUP) {
        unsigned* bits = reinterpret_cast<unsigned*>(shared + MASKS_AT);
        bits[thread] = region_bits<WINDOW>(16 * warp() + lane() / 4, lane() % 4, WINDOW - shift_h, false);
        bits[thread + WARPGROUP] = region_bits<WINDOW>(16 * warp() + lane() / 4, lane() % 4, WINDOW - shift_w, true);
    }

    unsigned tile = TILES_AT + team * TILES * TILE, other = tile + (TILES - 1) * TILE;
    unsigned kv = KV_AT + group * KV_BUFFERS * KV;
    // Hides what is the same for all windows and heads: kept in registers, it would not fit.
    auto forget = [&] { forget_origin(thread), forget_origin(tile), forget_origin(other), forget_origin(kv); };
    auto team_barrier = [&] {
        if constexpr (TEAM == GROUPS && TEAM > 1)
            __syncthreads();
        else
            named_barrier<WARPGROUP * TEAM>(1 + (TEAM > 1 ? GROUPS : 0) + team);
    };
    // stmatrix and ldmatrix: row lane % 16 of the warp's, 8 columns of 16 bytes `piece` + lane / 16
    auto matrix_at = [&](unsigned piece) {
        return (16 * warp() + lane() % 16) * 64 + ((piece + lane() / 16 ^ lane() / 2 % 4) << 4);
    };

    auto tile_at = [&](unsigned at) { return descriptor<64>(shared_address(shared + at)); };

    Rows now{}, next{};
    if (window < windows) now = place(window), next = TEAM == 1 ? now : locate(window, fetched(0), 0);
    __syncthreads();
    let_next_kernel_start();
    wait_for_kernels_ahead();
    if (window < windows) fetch(next, tile);
    barrier_wait(&barriers[WEIGHT_BARRIERS], 0);

    for (; RESIDENT ? window < windows : rounds > 0; --rounds, window += step) {
        if (!RESIDENT && window >= windows) {  // nothing left, but other teams wait for their weights
            if constexpr (!RESIDENT)
#pragma unroll 1
                for (int i = 0; i < CHUNKS; ++i) acquire(i), release(i);
            continue;
        }
        forget();
        const bool more = window + step < windows;
        copy_async_wait<0>();
        auto normed = [&] { return COSINE ? tile : other; };  // what is multiplied with Wqkv
        if constexpr (!COSINE) {
            if (fetches()) {
#pragma unroll
                for (unsigned i = 0; i < FETCHERS; ++i) {
                    const unsigned at = piece_of(fetched(i));
                    unsigned v[4 * SLABS];
                    float sum = 0, squares = 0;
#pragma unroll
                    for (int s = 0; s < SLABS; ++s) {
                        const uint4 four = *reinterpret_cast<const uint4*>(shared + tile + at + s * SLAB);
                        v[4 * s] = four.x, v[4 * s + 1] = four.y, v[4 * s + 2] = four.z, v[4 * s + 3] = four.w;
                    }
#pragma unroll
                    for (int k = 0; k < 4 * SLABS; ++k) {
                        const float2 two = unpack2<scalar_t>(v[k]);
                        sum += two.x + two.y;
                    }
                    const float mean = warp_sum<4>(sum) * (1.0f / C);
                    hold(v);  // unpacked again rather than kept as floats
#pragma unroll
                    for (int k = 0; k < 4 * SLABS; ++k) {
                        const float2 two = unpack2<scalar_t>(v[k]);
                        squares = fmaf(two.x - mean, two.x - mean, squares);
                        squares = fmaf(two.y - mean, two.y - mean, squares);
                    }
                    hold(v);
                    const float rstd = rsqrtf(fmaf(warp_sum<4>(squares), 1.0f / C, eps)), offset = -mean * rstd;
#pragma unroll
                    for (int k = 0; k < 4 * SLABS; ++k) {
                        const float2 two = unpack2<scalar_t>(v[k]);
                        v[k] = round2<scalar_t>(fmaf(two.x, rstd, offset), fmaf(two.y, rstd, offset));
                    }
#pragma unroll
                    for (int s = 0; s < SLABS; ++s)
                        *reinterpret_cast<uint4*>(shared + normed() + at + s * SLAB) =
                            make_uint4(v[4 * s], v[4 * s + 1], v[4 * s + 2], v[4 * s + 3]);
                }
            }
        }
        unsigned a[A_REGISTERS ? STEPS : 1][4];
        if constexpr (A_REGISTERS) {  // a warp's rows are its own
            __syncwarp();
#pragma unroll
            for (int k = 0; k < STEPS; ++k)
                load_matrix_x4(a[k], shared + normed() + k / 2 * SLAB + matrix_at(k % 2 * 2));
            __syncwarp();
        } else {
            fence_for_async();
            team_barrier();
        }
        if (ALONE && more) {
            if constexpr (TILES == 2 && (COSINE || A_REGISTERS)) {
                next = place(window + step);
                fetch(next, other);
            }
        }

        // ---- heads
        unsigned o[2 * OWN][4];
        float qkv[48];
        auto multiply = [&](int i) {
            forget();
            const unsigned long long b = tile_at(acquire(i)), rows = tile_at(normed());
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < STEPS; ++k) {
                const unsigned long long bk = b + k / 2 * (96 * 64 / 16) + k % 2 * 2;
                const unsigned long long ak = rows + k / 2 * (SLAB / 16) + k % 2 * 2;
                if constexpr (A_REGISTERS) {
                    if (k == 0)
                        wgmma_first<scalar_t>(qkv, a[A_REGISTERS ? k : 0], bk);
                    else
                        wgmma<scalar_t>(qkv, a[A_REGISTERS ? k : 0], bk);
                } else {
                    if (k == 0)
                        wgmma_first<scalar_t>(qkv, ak, bk);
                    else
                        wgmma<scalar_t>(qkv, ak, bk);
                }
            }
            wgmma_commit();
        };
        if (PIPELINED) multiply(0);
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            const int local = i * TEAM + member, head = rank * BLOCK_HEADS + local;
            if (!PIPELINED) multiply(i);
            uint4 bias[4];
            auto load_bias = [&] {
#pragma unroll
                for (int p = 0; p < 4; ++p) {
                    const unsigned at = (warp() * 4 + p) * 512 + lane() * 16;
                    if constexpr (BIAS_SHARED)
                        bias[p] = *reinterpret_cast<const uint4*>(shared + BIAS_AT + local * BIAS + at);
                    else
                        bias[p] = load_now(reinterpret_cast<const unsigned char*>(position_bias) + head * BIAS + at);
                }
            };
            if (BIAS_EARLY) load_bias();  // on its way during the product
            wgmma_wait<0>();
            hold(qkv);
            release(i);
            if (!ALONE && TEAMS == 1 && i == OWN - 1) cluster_arrive();  // the tile that was multiplied is free

            // biases, and norms
            float add[8], scales[2] = {1, 1};
            load<8>(vector + Q_BIAS + head * 32 + lane() % 4 * 8, add);
            auto biased_square = [&](float* sums, int r) {
                float squares = 0;
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    float& v = sums[e / 2 * 4 + 2 * r + e % 2];
                    v += add[e];
                    if (COSINE) squares = fmaf(v, v, squares);
                }
                return squares;
            };
            auto inverse_norm = [&](float squares) { return rsqrtf(fmaxf(warp_sum<4>(squares), 1e-24f)); };
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float squares = biased_square(qkv, r);
                if constexpr (COSINE) scales[r] = inverse_norm(squares) * vector[SCALE + head];
            }
            unsigned q[2][4];
#pragma unroll
            for (int j = 0; j < 4; ++j)
#pragma unroll
                for (int r = 0; r < 2; ++r)
                    q[j / 2][j % 2 * 2 + r] =
                        COSINE ? round2<scalar_t>(qkv[4 * j + 2 * r] * scales[r], qkv[4 * j + 2 * r + 1] * scales[r])
                               : round2<scalar_t>(qkv[4 * j + 2 * r], qkv[4 * j + 2 * r + 1]);
            if constexpr (COSINE) {
                load<8>(vector + K_BIAS + head * 32 + lane() % 4 * 8, add);
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const float scale = inverse_norm(biased_square(qkv + 16, r));
#pragma unroll
                    for (int e = 0; e < 8; ++e) qkv[16 + e / 2 * 4 + 2 * r + e % 2] *= scale;
                }
            }

            if (!BIAS_EARLY) load_bias();

            // k and v to shared memory; of two buffers the other warps are done with this one since the last barrier
            if (KV_BUFFERS == 1 && (i > 0 || A_REGISTERS)) named_barrier<WARPGROUP>(1 + group);
            store_k_v<scalar_t>(shared + kv, qkv, matrix_at);

            // logits: the sums start as bias and mask
            float s[KEYS / 2];
            start_logits(s, bias);
            if (now.row[0] & ~ROW) {
                const unsigned bits = (now.row[0] & LAST_Y ? masks[thread % WARPGROUP] : 0) |
                                      (now.row[0] & LAST_X ? masks[WARPGROUP + thread % WARPGROUP] : 0);
                mask_logits(s, bits);
            }
            fence_for_async();
            named_barrier<WARPGROUP>(1 + group);
            if (ALONE && i == OWN - 1) {  // all have multiplied LN(x) for the last time
                if constexpr (TILES == 1 && !COSINE) fetch(now, tile);
                if constexpr (TILES == 2 && !COSINE && !A_REGISTERS) {
                    if (more) next = place(window + step), fetch(next, other);
                }
            }
            {
                const unsigned long long b = tile_at(kv);
                wgmma_fence();
                wgmma<scalar_t>(s, q[0], b);
                wgmma<scalar_t>(s, q[1], b + 2);
                wgmma_commit();
                if (PIPELINED && i + 1 < OWN) {  // during this head's softmax
                    multiply(i + 1);
                    wgmma_wait<1>();
                } else {
                    wgmma_wait<0>();
                }
                hold(s);
            }

            // softmax, its division left to the result
            float sum[2];
            unsigned p[4][4];
            exponentiate<scalar_t>(s, p, sum);
            float result[16];
            weigh<scalar_t>(result, p, tile_at(kv + SLAB), sum);
            if constexpr (KV_BUFFERS == 2) kv = 2 * (KV_AT + group * 2 * KV) + KV - kv;
#pragma unroll
            for (int e = 0; e < 8; ++e)
                o[2 * i + e / 4][e % 4] = round2<scalar_t>(result[2 * e] * sum[e % 2], result[2 * e + 1] * sum[e % 2]);
            if ((!ALONE || TILES == 1) && i == 0 && more) {  // the next rows come into the second level cache
                const Rows rows = place(window + step);
                if (ALONE) next = rows;
#pragma unroll
                for (int r = 0; r < 2; ++r)
#pragma unroll
                    for (int k = 0; k < SLABS; k += 2)
                        if (member == 0) prefetch(x + size_t(rows.row[r] & ROW) * C + k * 32 + lane() % 4 * 8);
            }
        }

        if constexpr (!ALONE) {  // everyone gets all heads' results, in the tile that was multiplied (or its like)
            if constexpr (TEAMS == 1)
                cluster_wait();
            else
                team_barrier();
#pragma unroll
            for (int i = 0; i < OWN; ++i) {
                const unsigned slab = other + (rank * BLOCK_HEADS + i * TEAM + member) * SLAB;
#pragma unroll
                for (int j = 0; j < 2; ++j)
                    store_matrix_x4(shared_address(shared + slab + matrix_at(2 * j)), o[2 * i + j][0], o[2 * i + j][1],
                                    o[2 * i + j][2], o[2 * i + j][3]);
                if constexpr (CLUSTER > 1) {
                    __syncwarp();
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        const unsigned at = slab + piece_of(token(r));
                        const uint4 four = *reinterpret_cast<const uint4*>(shared + at);
#pragma unroll
                        for (unsigned other_block = 1; other_block < CLUSTER; ++other_block)
                            store_in_block(
                                address_in_block(shared_address(shared + at), (rank + other_block) % CLUSTER), four);
                    }
                }
            }
            fence_for_async();
            if constexpr (CLUSTER > 1) {
                cluster_barrier();
                fence_for_async();
            } else {
                team_barrier();
            }
        }

        // ---- projection
        const unsigned column0 = rank * BLOCK_HEADS * 32 + member * WIDTH;
        unsigned y[COSINE ? PARTS : 1][COLUMNS / 32][2][4];
        constexpr bool AGAIN = !ALONE && TILES == 1;  // x is read again, the tile has the heads' results
        uint4 kept[AGAIN && COSINE ? PARTS : 1][COLUMNS / 32][2];
        auto residual = [&](int part, int k, int r, unsigned column) {
            if constexpr (AGAIN)
                return kept[COSINE ? part : 0][k][r];
            else
                return *reinterpret_cast<const uint4*>(shared + tile + column / 32 * SLAB + piece_of(token(r)));
        };
        float mean[2] = {0, 0}, deviations[2] = {0, 0};  // COSINE: of this thread's rows
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            forget();
            float sums[COLUMNS / 2];
            {
                constexpr int LINES = RESIDENT ? BLOCK_HEADS * 32 : COLUMNS;  // of a slab of the weights
                const unsigned long long b = tile_at(acquire(OWN + part)), heads = tile_at(other);
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < STEPS; ++k) {
                    const unsigned long long bk = b + k / 2 * (LINES * 64 / 16) + k % 2 * 2;
                    if constexpr (ALONE) {
                        if (k == 0)
                            wgmma_first<scalar_t>(sums, o[ALONE ? k : 0], bk);
                        else
                            wgmma<scalar_t>(sums, o[ALONE ? k : 0], bk);
                    } else {
                        const unsigned long long ak = heads + k / 2 * (SLAB / 16) + k % 2 * 2;
                        if (k == 0)
                            wgmma_first<scalar_t>(sums, ak, bk);
                        else
                            wgmma<scalar_t>(sums, ak, bk);
                    }
                }
                wgmma_commit();
            }
            if constexpr (AGAIN) {
#pragma unroll
                for (int k = 0; k < COLUMNS / 32; ++k)
#pragma unroll
                    for (int r = 0; r < 2; ++r)
                        kept[COSINE ? part : 0][k][r] = load_now(x + size_t(now.row[r] & ROW) * C + column0 +
                                                                 part * COLUMNS + k * 32 + lane() % 4 * 8);
            }
            wgmma_wait<0>();
            hold(sums);
            release(OWN + part);
            if (ALONE && TILES == 1 && !COSINE) copy_async_wait<0>();
#pragma unroll
            for (int k = 0; k < COLUMNS / 32; ++k) {
                const unsigned column = column0 + part * COLUMNS + k * 32 + lane() % 4 * 8;
                float add[8];
                load<8>(vector + PROJ_BIAS + column, add);
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    if constexpr (COSINE) {
#pragma unroll
                        for (int e = 0; e < 8; ++e) sums[16 * k + e / 2 * 4 + 2 * r + e % 2] += add[e];
#pragma unroll
                        for (int e = 0; e < 4; ++e)
                            y[part][k][r][e] =
                                round2<scalar_t>(sums[16 * k + 4 * e + 2 * r], sums[16 * k + 4 * e + 2 * r + 1]);
                    } else {
                        const uint4 four = residual(part, k, r, column);
                        const unsigned words[4] = {four.x, four.y, four.z, four.w};
                        unsigned v[4];
#pragma unroll
                        for (int e = 0; e < 4; ++e) {
                            const float2 two = unpack2<scalar_t>(words[e]);
                            v[e] = round2<scalar_t>(sums[16 * k + 4 * e + 2 * r] + add[2 * e] + two.x,
                                                    sums[16 * k + 4 * e + 2 * r + 1] + add[2 * e + 1] + two.y);
                        }
                        if (token(r) < N)
                            *reinterpret_cast<uint4*>(out + size_t(now.row[r] & ROW) * C + column) =
                                make_uint4(v[0], v[1], v[2], v[3]);
                    }
                }
            }
            if constexpr (COSINE) {  // mean and deviations of these columns, joined with those before
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    float sum = 0, squares = 0;
#pragma unroll
                    for (int e = 0; e < COLUMNS / 4; ++e) sum += sums[e / 2 * 4 + 2 * r + e % 2];
                    const float here = warp_sum<4>(sum) * (1.0f / COLUMNS);
#pragma unroll
                    for (int e = 0; e < COLUMNS / 4; ++e) {
                        const float d = sums[e / 2 * 4 + 2 * r + e % 2] - here;
                        squares = fmaf(d, d, squares);
                    }
                    const float apart = here - mean[r], share = 1.0f / (part + 1);
                    deviations[r] += warp_sum<4>(squares) + apart * apart * (COLUMNS * part * share);
                    mean[r] += apart * share;
                }
            }
        }

        // ---- norm of the result
        if constexpr (COSINE) {
            if constexpr (!ALONE) {
                const unsigned all = STATS_AT + team * SPLIT * 64 * 8, mine = all + (rank * TEAM + member) * 64 * 8;
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const unsigned to = shared_address(shared + mine + token(r) * 8);
                    if (lane() % 4 == 0)
#pragma unroll
                        for (unsigned i = 0; i < CLUSTER; ++i)
                            store_in_block(CLUSTER > 1 ? address_in_block(to, i) : to,
                                           make_float2(mean[r], deviations[r]));
                }
                if constexpr (CLUSTER > 1)
                    cluster_barrier();
                else
                    team_barrier();
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    mean[r] = deviations[r] = 0;
#pragma unroll
                    for (int i = 0; i < SPLIT; ++i) {
                        const float2 theirs = *reinterpret_cast<const float2*>(shared + all + (i * 64 + token(r)) * 8);
                        const float apart = theirs.x - mean[r], share = 1.0f / (i + 1);
                        deviations[r] += theirs.y + apart * apart * (WIDTH * i * share);
                        mean[r] += apart * share;
                    }
                }
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) deviations[r] = rsqrtf(fmaf(deviations[r], 1.0f / C, eps));
#pragma unroll
            for (int part = 0; part < PARTS; ++part)
#pragma unroll
                for (int k = 0; k < COLUMNS / 32; ++k) {
                    const unsigned column = column0 + part * COLUMNS + k * 32 + lane() % 4 * 8;
                    float gamma[8], beta[8];
                    load<8>(vector + GAMMA + column, gamma);
                    load<8>(vector + BETA + column, beta);
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        const uint4 four = residual(part, k, r, column);
                        const unsigned words[4] = {four.x, four.y, four.z, four.w};
                        unsigned v[4];
#pragma unroll
                        for (int e = 0; e < 4; ++e) {
                            const float2 residual = unpack2<scalar_t>(words[e]);
                            const float2 two = unpack2<scalar_t>(y[part][k][r][e]);
                            v[e] = round2<scalar_t>(
                                residual.x + fmaf((two.x - mean[r]) * deviations[r], gamma[2 * e], beta[2 * e]),
                                residual.y +
                                    fmaf((two.y - mean[r]) * deviations[r], gamma[2 * e + 1], beta[2 * e + 1]));
                        }
                        if (token(r) < N)
                            *reinterpret_cast<uint4*>(out + size_t(now.row[r] & ROW) * C + column) =
                                make_uint4(v[0], v[1], v[2], v[3]);
                    }
                }
        }

        // ---- the next window
        if (more) {
            if constexpr (!ALONE) team_barrier();  // everyone has read x and the heads' results
            if constexpr (!ALONE) next = place(window + step);
            if constexpr (!ALONE || TILES == 1) {
                fetch(TEAM == 1 ? next : locate(window + step, fetched(0), 0), tile);
            } else {
                const unsigned was = tile;
                tile = other, other = was;
            }
            now = next;
        }
    }
}
