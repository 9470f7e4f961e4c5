// window_attention   out[i,h] = sum_j softmax_j(s_ij + bias[h,i,j] + mask_ij) v[j,h], N = MH*MW tokens i, j of a window
//                    s_ij = q[i,h] . k[j,h] scale, or (COSINE) q/|q| . k/|k| logit_scale[h]
// shapes       qkv [B*H*W, 3*C] (q | k | v, each [heads, D]) and out [B*H*W, C] scalar_t, rows in image order;
//              C = heads*D; qkv_bias [3*C] scalar_t: what padding's rows hold (null: zeros);
//              logit_scale [heads] float, COSINE only;
//              position_bias [heads, ceil(N/16), ceil(N/16), 32, 8] bias_t: times log2 e, in the order in which the
//              lanes hold an accumulator, -inf in columns past N (ops/attention.py: prepare_position_bias)
// windows      are cut after a cyclic shift by (shift_h, shift_w) of the image padded to whole windows (ROLL_PAD: the
//              image is shifted first and padded then). No copy is made: row and mask of a token come from its index.
// math         products on tensor cores (float: see mma_step), logits, softmax and sums in float32, key blocks online
// grid         (ceil(W/MW) * heads * Q_TILES, ceil(H/MH), B) blocks of 32*WARPS; a warp holds 16 queries;
//              static shared memory under 48 KB: the block's queries, STAGES blocks of KEY_BLOCK keys and values
// constants    scalar_t = float | __half | __nv_bfloat16; bias_t = __half, of float scalars float;
//              EXACT: float products as float32's, else tf32's; COSINE; ROLL_PAD; D; MH; MW; WARPS;
//              KEY_BLOCK % 16 == 0; STAGES; MIN_BLOCKS
// arch, bound  sm_75+ (bf16, tf32 sm_80+); memory-bound up to about N = 144, then by exponentials and products
#include "common.cuh"

constexpr int ELEMENT = sizeof(scalar_t);
constexpr int N = MH * MW;
constexpr int THREADS = 32 * WARPS;
constexpr int STRIPS = ceil_div(N, 16), PAIRS = ceil_div(N, 16);  // 16 queries; 16 keys: two accumulator tiles
constexpr int Q_TILES = ceil_div(STRIPS, WARPS);
constexpr int BLOCKS = ceil_div(N, KEY_BLOCK);
constexpr int TILES = BLOCKS > 1 ? KEY_BLOCK / 8 : ceil_div(N, 8);  // accumulator tiles of a key block
constexpr int K_STEP = 32 / ELEMENT;                                // elements of a k step of mma_step
constexpr int D_STEPS = ceil_div(D, K_STEP), D_TILES = ceil_div(D, 8);
constexpr int PITCH = D_STEPS * K_STEP + 16 / ELEMENT;  // an odd number of 16-byte pieces: no bank conflicts
constexpr int COPY = D * ELEMENT % 16 == 0 ? 16 : D * ELEMENT % 8 == 0 ? 8 : D * ELEMENT % 4 == 0 ? 4 : 2;  // bytes
constexpr int PIECE = COPY / ELEMENT;
constexpr int PIECES = D_STEPS * K_STEP / PIECE;  // of a row
constexpr int STRIP_PIECES = 16 * PIECES / 32;    // of 16 rows, for each lane
constexpr int BLOCK_STRIPS = KEY_BLOCK / 16;
constexpr int BIAS_PACK = 16 / sizeof(bias_t);
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float MASKED = -100.0f * LOG2_E;
static_assert(KEY_BLOCK % 16 == 0 && D <= 128 && COPY >= ELEMENT);

using Row = scalar_t[PITCH];

// 1 / max(|x|, 1e-12)
DEVICE float inverse_norm(float sum_of_squares) { return 1.0f / fmaxf(sqrtf(sum_of_squares), 1e-12f); }

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    window_attention(const scalar_t* qkv, const scalar_t* __restrict__ qkv_bias,
                     const bias_t* __restrict__ position_bias, const float* __restrict__ logit_scale, scalar_t* out,
                     int H, int W, int shift_h, int shift_w, int heads, float scale) {
    __shared__ __align__(16) scalar_t queries[16 * WARPS][PITCH];
    __shared__ __align__(16) scalar_t keys[STAGES][KEY_BLOCK][PITCH];
    __shared__ __align__(16) scalar_t values[STAGES][KEY_BLOCK][PITCH];
    __shared__ __align__(16) float key_norms[COSINE ? KEY_BLOCK : 1];
    __shared__ __align__(16) unsigned char regions[BLOCKS * KEY_BLOCK];

    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const unsigned q_tile = blockIdx.x % Q_TILES, head = blockIdx.x / Q_TILES % heads;
    const int window_x = blockIdx.x / Q_TILES / heads, window_y = blockIdx.y;
    const int C = heads * D;
    const int padded_h = gridDim.y * MH, padded_w = ceil_div(W, MW) * MW;
    const bool last_y = shift_h > 0 && window_y + 1 == gridDim.y;
    const bool last_x = shift_w > 0 && (window_x + 1) * MW == padded_w;

    // Row of the window's token i, -1 for padding.
    auto row_of = [&](unsigned i) -> int {
        int y = window_y * MH + i / MW, x = window_x * MW + i % MW;
        bool real;
        if constexpr (ROLL_PAD) {
            real = y < H && x < W;
            y += shift_h, x += shift_w;
            while (y >= H) y -= H;
            while (x >= W) x -= W;
        } else {
            y += shift_h, x += shift_w;
            if (y >= padded_h) y -= padded_h;
            if (x >= padded_w) x -= padded_w;
            real = y < H && x < W;
        }
        return real && i < N ? (int(blockIdx.z) * H + y) * W + x : -1;
    };

    // A warp starts to copy the head's q (if Q), k and v (if KV) of 16 tokens; zeros past the last one.
    enum Parts { Q = 1, KV = 2 };
    const bool has_bias = qkv_bias != nullptr;
    auto copy_strip = [&](int parts, unsigned strip, Row* q, Row* k, Row* v) {
#pragma unroll
        for (unsigned i = 0; i < STRIP_PIECES; ++i) {
            const unsigned piece = i * 32 + lane, row = piece / PIECES, column = piece % PIECES * PIECE;
            const unsigned token = strip * 16 + row;
            const int from = row_of(token);
            const scalar_t* p =
                (from >= 0 ? qkv + size_t(unsigned(from)) * unsigned(3 * C) : qkv_bias) + head * D + column;
            const bool valid = (from >= 0 || (has_bias && token < N)) && column < D;
            if (!valid) p = qkv;
            if (parts & Q) copy_async<COPY>(&q[row][column], p, valid);
            if (parts & KV) copy_async<COPY>(&k[row][column], p + C, valid);
            if (parts & KV) copy_async<COPY>(&v[row][column], p + 2 * C, valid);
        }
    };
    auto copy_block = [&](unsigned block, unsigned stage) {
        for (unsigned i = (warp + block * (WARPS - 1) * BLOCK_STRIPS) % WARPS; i < BLOCK_STRIPS; i += WARPS)
            copy_strip(KV, block * BLOCK_STRIPS + i, nullptr, &keys[stage][i * 16], &values[stage][i * 16]);
    };

    let_next_kernel_start();
    wait_for_kernels_ahead();
    if constexpr (Q_TILES == 1 && STAGES * BLOCK_STRIPS == WARPS) {  // all at once, each warp the tokens of its queries
#pragma unroll
        for (unsigned s = 0; s < STAGES; ++s) {  // the queries first: the first block of keys meets them all
            const unsigned i = warp - s * BLOCK_STRIPS;
            const int parts = (s == 0 ? Q : 0) | (i < BLOCK_STRIPS ? KV : 0);
            if (parts) copy_strip(parts, warp, &queries[warp * 16], &keys[s][i * 16], &values[s][i * 16]);
            copy_async_commit();
        }
    } else {
        copy_strip(Q, q_tile * WARPS + warp, &queries[warp * 16], nullptr, nullptr);
#pragma unroll
        for (unsigned s = 0; s < STAGES; ++s) {
            copy_block(s, s);
            copy_async_commit();
        }
    }

    // A shifted axis has its last window in two regions: the tokens that the shift brought round are the second.
    if (last_y || last_x)
#pragma unroll 1
        for (unsigned i = threadIdx.x; i < BLOCKS * KEY_BLOCK; i += THREADS)
            regions[i] = (last_y && int(i / MW) >= MH - shift_h) + 2 * (last_x && int(i % MW) >= MW - shift_w);

    const unsigned strip = q_tile * WARPS + warp;
    const bool active = STRIPS % WARPS == 0 || strip < STRIPS;
    constexpr int BIAS_PACKS = ceil_div(TILES, 2) * 8 / BIAS_PACK;
    Pack<bias_t, BIAS_PACK> bias[BIAS_PACKS];
    auto load_bias = [&](int block) {  // long before it is used
        const bias_t* p = position_bias + ((size_t(head) * STRIPS + strip) * PAIRS * 32 + lane) * 8;
#pragma unroll
        for (int i = 0; i < BIAS_PACKS; ++i) {
            const int pair = block * (KEY_BLOCK / 16) + i * BIAS_PACK / 8;
            if (pair < PAIRS) {
                bias[i].word = load_now(p + pair * 256 + i * BIAS_PACK % 8);
            } else {
#pragma unroll
                for (int e = 0; e < BIAS_PACK; ++e) bias[i].v[e] = from_float<bias_t>(-infinity());
            }
        }
    };
    if (active) load_bias(0);

    unsigned q[D_STEPS][4];
    float scales[2] = {scale * LOG2_E, scale * LOG2_E};  // of query rows g and g + 8
    float maximum[2] = {-infinity(), -infinity()}, sum[2] = {0, 0};
    float o[D_TILES][4] = {};
    int stage = 0;

#pragma unroll 1
    for (int block = 0; block < BLOCKS; ++block) {
        copy_async_wait<STAGES - 1>();
        __syncthreads();
        if constexpr (COSINE) {
            for (unsigned i = threadIdx.x; i < KEY_BLOCK; i += THREADS) {
                float squares = 0;
#pragma unroll
                for (int c = 0; c < D_STEPS * K_STEP; c += 16 / ELEMENT) {
                    float x[16 / ELEMENT];
                    load<16 / ELEMENT>(&keys[stage][i][c], x);
#pragma unroll
                    for (int e = 0; e < 16 / ELEMENT; ++e) squares = fmaf(x[e], x[e], squares);
                }
                key_norms[i] = inverse_norm(squares);
            }
            __syncthreads();
        }
        if (block == 0) {
            float squares[2] = {0, 0};
#pragma unroll
            for (int k = 0; k < D_STEPS; ++k) {
                load_matrix_x4(q[k], &queries[warp * 16 + lane % 16][k * K_STEP + lane / 16 * (K_STEP / 2)]);
                if constexpr (COSINE) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) squares[i % 2] += word_squares<scalar_t>(q[k][i]);
                }
            }
            if constexpr (COSINE) {
#pragma unroll
                for (int r = 0; r < 2; ++r)
                    scales[r] = inverse_norm(warp_sum<4>(squares[r])) * logit_scale[head] * LOG2_E;
            }
        }
        if (active) {
            // s = q k^T
            float s[TILES][4] = {};
#pragma unroll
            for (int j = 0; j < TILES; j += 2) {
#pragma unroll
                for (int k = 0; k < D_STEPS; ++k) {
                    unsigned b[4];  // two k halves of two tiles
                    load_matrix_x4(
                        b, &keys[stage][j * 8 + lane / 16 * 8 + lane % 8][k * K_STEP + lane / 8 % 2 * (K_STEP / 2)]);
                    mma_step<scalar_t, EXACT>(s[j], q[k], {b[0], b[1]});
                    if (j + 1 < TILES) mma_step<scalar_t, EXACT>(s[j + 1], q[k], {b[2], b[3]});
                }
            }
#pragma unroll
            for (int j = 0; j < TILES; ++j) {
                float norms[2] = {1, 1};
                if constexpr (COSINE) load<2>(&key_norms[j * 8 + t * 2], norms);
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int i = j * 4 + e;
                    if constexpr (COSINE) s[j][e] *= norms[e % 2];
                    s[j][e] = fmaf(s[j][e], scales[e / 2], to_float(bias[i / BIAS_PACK].v[i % BIAS_PACK]));
                }
            }
            if (last_y || last_x) {
                const int mine[2] = {regions[min(strip * 16 + g, N - 1u)], regions[min(strip * 16 + g + 8, N - 1u)]};
#pragma unroll
                for (int j = 0; j < TILES; ++j) {
                    const int two =
                        *reinterpret_cast<const unsigned short*>(&regions[block * KEY_BLOCK + j * 8 + t * 2]);
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        if ((e % 2 ? two >> 8 : two & 255) != mine[e / 2]) s[j][e] += MASKED;
                }
            }
            if (block + 1 < BLOCKS) load_bias(block + 1);

            // p = exp(s - max), unnormalised; what was summed under the old maximum is scaled to the new one
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float high = maximum[r];
#pragma unroll
                for (int j = 0; j < TILES; ++j) high = fmaxf(high, fmaxf(s[j][2 * r], s[j][2 * r + 1]));
                high = warp_max<4>(high);
                if constexpr (BLOCKS > 1) {
                    const float shrink = fast_exp2(maximum[r] - high);
                    sum[r] *= shrink;
#pragma unroll
                    for (int n = 0; n < D_TILES; ++n) o[n][2 * r] *= shrink, o[n][2 * r + 1] *= shrink;
                }
                maximum[r] = high;
#pragma unroll
                for (int j = 0; j < TILES; ++j) {
#pragma unroll
                    for (int e = 2 * r; e < 2 * r + 2; ++e) sum[r] += s[j][e] = fast_exp2(s[j][e] - high);
                }
            }

            // o += p v
            if constexpr (ELEMENT == 2) {
#pragma unroll
                for (int j = 0; j < TILES; j += 2) {
                    const bool full = j + 1 < TILES;
                    const int j1 = full ? j + 1 : j;
                    const unsigned a[4] = {pack2<scalar_t>(s[j][0], s[j][1]), pack2<scalar_t>(s[j][2], s[j][3]),
                                           full ? pack2<scalar_t>(s[j1][0], s[j1][1]) : 0u,
                                           full ? pack2<scalar_t>(s[j1][2], s[j1][3]) : 0u};
#pragma unroll
                    for (int n = 0; n < D_TILES; n += 2) {
                        unsigned b[4];
                        load_matrix_x4_trans(b, &values[stage][j * 8 + lane % 16][n * 8 + lane / 16 * 8]);
                        mma_step<scalar_t, EXACT>(o[n], a, {b[0], b[1]});
                        if (n + 1 < D_TILES) mma_step<scalar_t, EXACT>(o[n + 1], a, {b[2], b[3]});
                    }
                }
            } else {
                // An accumulator's columns 2t, 2t + 1 go in as k = t, t + 4, and so do the values' rows.
#pragma unroll
                for (int j = 0; j < TILES; ++j) {
                    const unsigned a[4] = {__float_as_uint(s[j][0]), __float_as_uint(s[j][2]), __float_as_uint(s[j][1]),
                                           __float_as_uint(s[j][3])};
#pragma unroll
                    for (int n = 0; n < D_TILES; ++n) {
                        const scalar_t* v = &values[stage][j * 8 + t * 2][n * 8 + g];
                        mma_step<scalar_t, EXACT>(
                            o[n], a, {__float_as_uint(to_float(v[0])), __float_as_uint(to_float(v[PITCH]))});
                    }
                }
            }
        }
        if constexpr (BLOCKS > STAGES) {
            __syncthreads();  // all have read this stage
            if (block + STAGES < BLOCKS) copy_block(block + STAGES, stage);
        }
        if constexpr (BLOCKS > 1) {
            copy_async_commit();  // one group a block, empty or not: that is what the wait counts
            stage = stage + 1 == STAGES ? 0 : stage + 1;
        }
    }
    if (!active) return;

    // Through the warp's own query rows, so that whole pieces of a row are written.
    __syncwarp();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float inverse = __fdividef(1.0f, warp_sum<4>(sum[r]));
#pragma unroll
        for (int n = 0; n < D_TILES; ++n) {
            const float pair[2] = {o[n][2 * r] * inverse, o[n][2 * r + 1] * inverse};
            store<2>(&queries[warp * 16 + r * 8 + g][n * 8 + t * 2], pair);
        }
    }
    __syncwarp();
    using Wide = typename Word<COPY>::type;
#pragma unroll
    for (unsigned i = 0; i < STRIP_PIECES; ++i) {
        const unsigned piece = i * 32 + lane, row = piece / PIECES, column = piece % PIECES * PIECE;
        const int to = row_of(strip * 16 + row);
        if (to >= 0 && column < D)
            *reinterpret_cast<Wide*>(out + size_t(unsigned(to)) * unsigned(C) + head * D + column) =
                *reinterpret_cast<const Wide*>(&queries[warp * 16 + row][column]);
    }
}
