// attention_cluster   attention_block.cu's out = x + .. for few windows in wide stages: a cluster of HEADS blocks has one
//                     window, each block a head, then 64 columns of the result for half of the window's rows
// shapes       x, out [B, H, W, C] scalar_t (out may be x), H and W multiples of WINDOW; position_bias
//              [HEADS, 4, 4, 32, 8] half, image and vectors as ops/fused_attention.py packs them; where given, moments
//              [B H W, C / 32]: mean and sum of squared deviations of each 32 neighbours in a row of out
// math         products by wgmma, sums in float32; q, k, v, P and the heads' results are rounded to scalar_t between.
//              V1's norm comes after the product: (x - mean) W^T = x W^T - mean sums, sums those of the rows of W
// chain        all that does not depend on x is there before: weights in shared memory, the bias in registers. x comes
//              to all blocks at once, each fetches some of its rows for all, in pieces of 128 channels; each piece is
//              multiplied while the next is on its way, and its moments are taken. A thread sends its rows' results to
//              the blocks that need them, in an order in which all blocks receive at the same rate; they are multiplied
//              in the order in which they come: out^T = Wproj heads^T
// constants    scalar_t = __half | __nv_bfloat16; C % 128 == 0; WINDOW = 7 | 8; COSINE: V2, as attention_block.cu has it
// grid         clusters, one a window: (HEADS times the windows of a row, rows of windows, B) blocks of a warpgroup;
//              shared memory see ops/fused_attention.py
// arch, bound  sm_90a; latency, of the exchange above all
#include "attention.cuh"

constexpr int N = WINDOW * WINDOW, KEYS = N <= 56 ? 56 : 64;
constexpr int HEADS = C / 32, SLABS = C / 32, PAIRS = HEADS / 2, PIECES = SLABS / 4;
constexpr int HALF = N / 16 * 8,
              ROWS = N - HALF;      // the second half of a window's rows begins at ROWS, its tile at HALF
constexpr int BATCHES = PAIRS / 2;  // of the heads' results, four each, that are awaited together

// What wgmma reads is in slabs of 32 channels: rows of 64 bytes, 64-byte swizzle, as in attention_block.cu
constexpr int SLAB = 64 * 64, RESULT = 32 * 64, HEAD = 96 * C * 2;  // bytes: of 64 rows, of 32; the weights of q, k, v
constexpr int PIECE = 128 * 2, ROW = C * 2 + 16;                    // of x; 16 more, and eight rows are in all banks
enum Vector {                                                       // of a block
    Q_BIAS = 0,
    K_BIAS = 32,  // COSINE
    SUMS = 32,    // V1: of q's rows, k's, v's
    PROJ_BIAS = COSINE ? 64 : 128,
    GAMMA = 128,
    BETA = 192,
    SCALE = 256,
    VECTORS = COSINE ? 260 : 192
};
constexpr int PROJ_AT = HEAD, X_AT = PROJ_AT + SLABS * SLAB;
constexpr int RESULTS_AT = X_AT;  // the heads', when x has been multiplied
constexpr bool OVER = C > 384;    // k and v where the weights of q, k and v were
constexpr int X = (N * ROW + 1023) / 1024 * 1024, KV_AT = OVER ? 0 : X_AT + X;
constexpr int TURN_AT = 2 * SLAB, PITCH = 68;       // floats; where the weights were, too
constexpr int STATS_AT = TURN_AT + 32 * PITCH * 4;  // COSINE
constexpr int VECTORS_AT = X_AT + X + (OVER ? 0 : 2 * SLAB);
constexpr int BARRIERS_AT = VECTORS_AT + VECTORS * 4;
enum Barrier {
    TABLES,
    PROJECTION,
    STATS,
    WEIGHTS,
    ROWS_OF_X = WEIGHTS + PIECES,
    RESULTS = ROWS_OF_X + PIECES,
    BARRIERS = RESULTS + BATCHES
};
static_assert(C % 128 == 0 && (WINDOW == 7 || WINDOW == 8) && PIECES <= 4 && HEADS <= 16);
static_assert(STATS_AT + PAIRS * 32 * 16 <= HEAD && HEADS * RESULT <= X && HALF % 8 == 0 && ROWS <= 32);

extern "C" __global__ void __launch_bounds__(WARPGROUP, 1) __cluster_dims__(HEADS, 1, 1)
    attention_cluster(const scalar_t* x, const scalar_t* image, const float* vectors, const __half* position_bias,
                      scalar_t* out, float2* moments, int H, int W, int shift_h, int shift_w, float eps) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const unsigned thread = threadIdx.x, lane = thread % 32, warp = thread / 32, t = lane % 4;
    const unsigned rank = cluster_rank(), pair = rank / 2, half = rank % 2;
    unsigned long long* barriers = reinterpret_cast<unsigned long long*>(shared + BARRIERS_AT);
    const float* vector = reinterpret_cast<const float*>(shared + VECTORS_AT);

    // ---- what does not depend on kernels ahead
    if (thread == 0) {
        for (int i = 0; i < BARRIERS; ++i) barrier_init(&barriers[i], 1);
        barrier_init_fence();
        for (int i = 0; i < PIECES; ++i) {
            constexpr int PART = HEAD / PIECES;
            barrier_expect(&barriers[WEIGHTS + i], PART);
            copy_bulk(shared + i * PART, image + (rank * PIECES + i) * (PART / 2), PART, &barriers[WEIGHTS + i]);
            barrier_expect(&barriers[ROWS_OF_X + i], N * PIECE);
        }
        barrier_expect(&barriers[TABLES], 4 * VECTORS);
        copy_bulk(shared + VECTORS_AT, vectors + rank * VECTORS, 4 * VECTORS, &barriers[TABLES]);
        barrier_expect(&barriers[PROJECTION], SLABS * SLAB);
        for (int i = 0; i < BATCHES; ++i) barrier_expect(&barriers[RESULTS + i], 4 * (half ? HALF : ROWS) * 64);
        if (COSINE) barrier_expect(&barriers[STATS], PAIRS * 32 * 16);
    }
    auto token = [&](unsigned i) { return 16 * warp + 8 * i + lane / 4; };  // of accumulator row i of a thread
    auto piece_of = [&](unsigned row) { return row * 64 + ((t ^ row / 2 % 4) << 4); };
    uint4 bias[4];
#pragma unroll
    for (int p = 0; p < 4; ++p)
        bias[p] = load_now(reinterpret_cast<const unsigned char*>(position_bias) + ((rank * 4 + warp) * 4 + p) * 512 +
                           lane * 16);

    const unsigned y0 = blockIdx.y * WINDOW, x0 = blockIdx.x / HEADS * WINDOW;
    auto row_of = [&](unsigned token) {  // of x, in global memory
        unsigned y = y0 + token / WINDOW + shift_h, x = x0 + token % WINDOW + shift_w;
        y -= y >= H ? H : 0, x -= x >= W ? W : 0;
        return (blockIdx.z * H + y) * W + x;
    };

    const unsigned fetched = rank + HEADS * (4 * lane + warp);  // a row of x that this thread fetches for all blocks
    unsigned fetched_row = row_of(fetched < N ? fetched : 0);
    forget_origin(fetched_row);  // now, not when the time has come
    cluster_arrive_relaxed();
    let_next_kernel_start();
    cluster_wait();  // the barriers of all blocks are there
    if (thread == 0) {
        constexpr int PART = SLABS * SLAB / 2;
        copy_bulk_to_blocks(shared + PROJ_AT + half * PART,
                            image + HEADS * (HEAD / 2) + pair * PART + half * (PART / 2), PART, &barriers[PROJECTION],
                            3 << 2 * pair);
    }
    wait_for_kernels_ahead();
    if (fetched < N)
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece)
            copy_bulk_to_blocks(shared + X_AT + fetched * ROW + piece * PIECE,
                                x + size_t(fetched_row) * C + piece * (PIECE / 2), PIECE, &barriers[ROWS_OF_X + piece],
                                (1 << HEADS) - 1);

    // ---- while x is on its way
    float s[KEYS / 2];  // logits: bias and mask, to which q and k will be added
    start_logits(s, bias);
    unsigned masked = 0;
    if (shift_h > 0 && y0 + WINDOW == H) masked = region_bits<WINDOW>(token(0), t, WINDOW - shift_h, false);
    if (shift_w > 0 && x0 + WINDOW == W) masked |= region_bits<WINDOW>(token(0), t, WINDOW - shift_w, true);
    if (masked) mask_logits(s, masked);
    hold(s);
    const unsigned mine = thread / 4;  // of this block's tokens, of whose result a thread has 16 columns
    const bool writes = mine < ROWS && half * HALF + mine >= half * ROWS;
    const size_t out_row = row_of(half * HALF + (writes ? mine : 0));
    auto tile_at = [&](unsigned at) { return descriptor<64>(shared_address(shared + at)); };

    // ---- q, k and v, and V1's norm of a thread's two rows
    float qkv[48], guess[2], mean[2] = {0, 0}, deviations[2] = {0, 0};
    unsigned a[2][8][4];  // of two pieces
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
        unsigned (&rows)[8][4] = a[piece % 2];
        barrier_wait(&barriers[WEIGHTS + piece], 0);
        barrier_wait(&barriers[ROWS_OF_X + piece], 0);
        if (piece > 1) wgmma_wait<1>();  // of the piece before the last
        const unsigned char* first = shared + X_AT + min(16 * warp + lane % 16, N - 1u) * ROW + lane / 16 * 16;
#pragma unroll
        for (int k = 0; k < 8; ++k) load_matrix_x4(rows[k], first + piece * PIECE + k * 32);
        if (!COSINE && piece == 0)
#pragma unroll
            for (int r = 0; r < 2; ++r)
                guess[r] = to_float(*reinterpret_cast<const scalar_t*>(shared + X_AT + min(token(r), N - 1u) * ROW));
        wgmma_fence();
        float sum[2] = {0, 0}, squares[2] = {0, 0};  // of x less a first guess of the mean
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            const unsigned long long b = tile_at((4 * piece + k / 2) * 96 * 64) + k % 2 * 2;
            if constexpr (!COSINE)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const float2 two = unpack2<scalar_t>(rows[k][e]);
                    const float one = two.x - guess[e % 2], other = two.y - guess[e % 2];
                    sum[e % 2] += one + other;
                    squares[e % 2] = fmaf(one, one, fmaf(other, other, squares[e % 2]));
                }
            if (piece + k == 0)
                wgmma_first<scalar_t>(qkv, rows[k], b);
            else
                wgmma<scalar_t>(qkv, rows[k], b);
        }
        wgmma_commit();
        if constexpr (!COSINE)
#pragma unroll
            for (int r = 0; r < 2; ++r)  // here, lest the compiler leaves it all for the last piece
                mean[r] += warp_sum<4>(sum[r]), deviations[r] += warp_sum<4>(squares[r]);
    }

    // ---- while that goes on: what will be added to q, k and v, and what to the result, its bias and x
    barrier_wait(&barriers[TABLES], 0);
    float plus[COSINE ? 1 : 48], add[8];
    if constexpr (!COSINE) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float apart = mean[r] * (1.0f / C);
            const float variance = fmaf(deviations[r], 1.0f / C, -apart * apart);
            deviations[r] = rsqrtf(fmaxf(variance, 0) + eps), mean[r] = -(guess[r] + apart) * deviations[r];
        }
        float q_bias[8];
        load<8>(vector + Q_BIAS + 8 * t, q_bias);
#pragma unroll
        for (int m = 0; m < 3; ++m) {
            load<8>(vector + SUMS + 32 * m + 8 * t, add);
#pragma unroll
            for (int r = 0; r < 2; ++r)
#pragma unroll
                for (int e = 0; e < 8; ++e)
                    plus[16 * m + e / 2 * 4 + 2 * r + e % 2] = m ? mean[r] * add[e] : fmaf(mean[r], add[e], q_bias[e]);
        }
        hold(plus);
    }
    float sums[16];                  // of columns 16 warp + lane / 4 and + 8, of tokens 8 j + 2 t and + 1
    uint4 kept[COSINE ? 2 : 1];      // V2: x where the result will be; V1: it is in the sums
    auto matrix = [&](unsigned i) {  // which of two times four blocks of 8 x 8 a lane has the address of: token, column
        return make_uint2(16 * i + lane / 16 * 8 + lane % 8, 16 * warp + lane / 8 % 2 * 8);
    };
    if constexpr (COSINE) {
#pragma unroll
        for (int k = 0; k < 2; ++k)
            kept[k] = *reinterpret_cast<const uint4*>(shared + X_AT + min(half * HALF + mine, N - 1u) * ROW +
                                                      (2 * pair + k) * 64 + t * 16);
    } else {
        const float* proj_bias = vector + PROJ_BIAS + 16 * warp + lane / 4;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint2 block = matrix(i);
            unsigned four[4];
            load_matrix_x4_trans(four,
                                 shared + X_AT + min(half * HALF + block.x, N - 1u) * ROW + (64 * pair + block.y) * 2);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const float2 two = unpack2<scalar_t>(four[k]);
                sums[8 * i + 2 * k] = two.x + proj_bias[k % 2 * 8];
                sums[8 * i + 2 * k + 1] = two.y + proj_bias[k % 2 * 8];
            }
        }
        hold(sums);
    }
    wgmma_wait<0>();
    hold(qkv);
    cluster_arrive_relaxed();  // others may write to where x was
    if (OVER) __syncthreads();

    // ---- norm, biases
    if constexpr (!COSINE) {
#pragma unroll
        for (int e = 0; e < 48; ++e) qkv[e] = fmaf(qkv[e], deviations[e / 2 % 2], plus[e]);
    } else {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            load<8>(vector + (m ? K_BIAS : Q_BIAS) + 8 * t, add);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float squares = 0;
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    float& v = qkv[16 * m + e / 2 * 4 + 2 * r + e % 2];
                    v += add[e];
                    squares = fmaf(v, v, squares);
                }
                const float scale = rsqrtf(fmaxf(warp_sum<4>(squares), 1e-24f)) * (m ? 1 : vector[SCALE]);
#pragma unroll
                for (int e = 0; e < 8; ++e) qkv[16 * m + e / 2 * 4 + 2 * r + e % 2] *= scale;
            }
        }
    }
    unsigned q[2][4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int r = 0; r < 2; ++r)
            q[j / 2][j % 2 * 2 + r] = round2<scalar_t>(qkv[4 * j + 2 * r], qkv[4 * j + 2 * r + 1]);
    store_k_v<scalar_t>(shared + KV_AT, qkv, [&](unsigned piece) {
        return (16 * warp + lane % 16) * 64 + ((piece + lane / 16 ^ lane / 2 % 4) << 4);
    });

    // ---- logits, and their softmax, its division left to the result
    fence_for_async();
    __syncthreads();
    {
        const unsigned long long b = tile_at(KV_AT);
        wgmma_fence();
        wgmma<scalar_t>(s, q[0], b);
        wgmma<scalar_t>(s, q[1], b + 2);
        wgmma_commit();
        wgmma_wait<0>();
        hold(s);
    }
    float sum[2];
    unsigned p[4][4];
    exponentiate<scalar_t>(s, p, sum);
    float result[16];
    weigh<scalar_t>(result, p, tile_at(KV_AT + SLAB), sum);

    // ---- the head's result to all blocks that have a row in their half; its columns 8 j + 2 t + .. become neighbours
    cluster_wait();
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) {
        const unsigned into = 2 * ((pair + i) % PAIRS);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            unsigned v[4];
#pragma unroll
            for (int j = 0; j < 4; ++j)
                v[j] = round2<scalar_t>(result[4 * j + 2 * r] * sum[r], result[4 * j + 2 * r + 1] * sum[r]);
            const unsigned second = token(r) >= ROWS, row = token(r) - second * HALF;
            if (N == 64 || token(r) < N)
                store_async_in_block(
                    address_in_block(shared_address(shared + RESULTS_AT + rank * RESULT + piece_of(row)),
                                     into + second),
                    make_uint4(v[0], v[1], v[2], v[3]),
                    address_in_block(shared_address(&barriers[RESULTS + i / 2]), into + second));
        }
    }

    // ---- projection, in the order in which the heads come
    barrier_wait(&barriers[PROJECTION], 0);
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) {
        if (i % 2 == 0) {
            barrier_wait(&barriers[RESULTS + i / 2], 0);
            fence_for_async();
            wgmma_fence();
        }
        const unsigned first = 2 * ((pair + PAIRS - i) % PAIRS);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const unsigned long long a = tile_at(PROJ_AT + first * SLAB) + k / 2 * (SLAB / 16) + k % 2 * 2;
            const unsigned long long b = tile_at(RESULTS_AT + first * RESULT) + k / 2 * (RESULT / 16) + k % 2 * 2;
            if (COSINE && i + k == 0)
                wgmma_first<scalar_t>(sums, a, b);
            else
                wgmma<scalar_t>(sums, a, b);
        }
    }
    wgmma_commit();
    wgmma_wait<0>();
    hold(sums);

    // ---- transposed by way of shared memory: a thread has columns 8 t .. and 32 + 8 t .. of a row
    uint4 whole[2];
    if constexpr (COSINE) {
        float* results = reinterpret_cast<float*>(shared + TURN_AT);
#pragma unroll
        for (int e = 0; e < 16; ++e)
            results[(e / 4 * 8 + 2 * t + e % 2) * PITCH + 16 * warp + lane / 4 + e / 2 % 2 * 8] = sums[e];
        __syncthreads();
        float y[16];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            load<8>(vector + PROJ_BIAS + 32 * k + 8 * t, add);
#pragma unroll
            for (int e = 0; e < 8; e += 4) {
                const float4 four = load_shared4(results + mine * PITCH + 32 * k + 8 * t + e);
                y[8 * k + e] = four.x + add[e], y[8 * k + e + 1] = four.y + add[e + 1];
                y[8 * k + e + 2] = four.z + add[e + 2], y[8 * k + e + 3] = four.w + add[e + 3];
            }
        }

        // norm of the result: of these 64 columns, then of all
        float total = 0, squares = 0;
#pragma unroll
        for (int e = 0; e < 16; ++e) total += y[e];
        const float here = warp_sum<4>(total) * (1.0f / 64);
#pragma unroll
        for (int e = 0; e < 16; ++e) squares = fmaf(y[e] - here, y[e] - here, squares);
        squares = warp_sum<4>(squares);
        const unsigned at = shared_address(shared + STATS_AT + (pair * 32 + mine) * 16);
#pragma unroll
        for (unsigned i = 0; i < PAIRS; i += 4)
            if (i + t < PAIRS) {
                const unsigned into = 2 * (i + t) + half;
                store_async_in_block(address_in_block(at, into), here, squares, 0, 0,
                                     address_in_block(shared_address(&barriers[STATS]), into));
            }
        barrier_wait(&barriers[STATS], 0);
        mean[0] = deviations[0] = 0;
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) {
            const float2 theirs = *reinterpret_cast<const float2*>(shared + STATS_AT + (i * 32 + mine) * 16);
            const float apart = theirs.x - mean[0], share = 1.0f / (i + 1);
            deviations[0] += theirs.y + apart * apart * (64 * i * share);
            mean[0] += apart * share;
        }
        const float scale = rsqrtf(fmaf(deviations[0], 1.0f / C, eps));
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            float gamma[8], beta[8];
            load<8>(vector + GAMMA + 32 * k + 8 * t, gamma);
            load<8>(vector + BETA + 32 * k + 8 * t, beta);
            const unsigned words[4] = {kept[k].x, kept[k].y, kept[k].z, kept[k].w};
            unsigned v[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float2 two = unpack2<scalar_t>(words[e]);
                const float a = y[8 * k + 2 * e] - mean[0], b = y[8 * k + 2 * e + 1] - mean[0];
                v[e] = round2<scalar_t>(fmaf(a * scale, gamma[2 * e], beta[2 * e]) + two.x,
                                        fmaf(b * scale, gamma[2 * e + 1], beta[2 * e + 1]) + two.y);
            }
            whole[k] = make_uint4(v[0], v[1], v[2], v[3]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint2 block = matrix(i);
            unsigned four[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) four[k] = round2<scalar_t>(sums[8 * i + 2 * k], sums[8 * i + 2 * k + 1]);
            store_matrix_x4_trans(shared_address(shared + TURN_AT + block.x * (2 * PITCH + 8) + block.y * 2), four[0],
                                  four[1], four[2], four[3]);
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < 2; ++k)
            whole[k] = *reinterpret_cast<const uint4*>(shared + TURN_AT + mine * (2 * PITCH + 8) + 64 * k + 16 * t);
    }
    if (writes)
#pragma unroll
        for (int k = 0; k < 2; ++k)
            *reinterpret_cast<uint4*>(out + out_row * C + (2 * pair + k) * 32 + 8 * t) = whole[k];
    if (!COSINE && moments)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const unsigned words[4] = {whole[k].x, whole[k].y, whole[k].z, whole[k].w};
            float z[8];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float2 two = unpack2<scalar_t>(words[e]);
                z[2 * e] = two.x, z[2 * e + 1] = two.y;
            }
            const float2 of_all = moments_of_four(z);
            if (writes && t == 0) moments[out_row * HEADS + 2 * pair + k] = of_all;
        }
}
