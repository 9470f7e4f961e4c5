// patch_embed  out[b,h,w] = LN(W vec(patch[b,h,w]) + bias) + position[h,w], without the LN where !NORM;
//              patch[b,h,w][c,i,j] = pixel (h PH + i, w PW + j) of channel c, zero outside the image
// shapes       x [B, CIN, height, width] float or scalar_t, normalised pixels; or [B, height, width, CIN] unsigned char,
//              normalised here as pixel * affine[0,c] + affine[1,c], affine [2, CIN] float;
//              weight [C, CIN, PH, PW], bias, gamma, beta [C], position [H, W, C], out [B, H, W, C] scalar_t;
//              bias may be null, position where !POSITION. H, W are ceil(height / PH), ceil(width / PW), or the floor: pixels beyond
//              the last patch are not read.
// math         products of scalar_t on tensor cores (float: in three tf32 parts, as exact as float32), float32 sums;
//              float32 LayerNorm, two-pass
// grid         any number of blocks of WARPS warps; SPLIT warps share 16 patches, each has every SPLIT-th 32 channels,
//              and they take sixteens in turn. Shared memory: 3 WIDTH floats; the weights, 16 STEPS WIDTH, where RESIDENT;
//              for bytes 2 CIN floats; [WARPS][16] floats where SPLIT > 1
// constants    scalar_t = float | __half | __nv_bfloat16; pixel_t; C, CIN, PH, PW; WARPS % SPLIT == 0; BLOCKS that a
//              multiprocessor has at a time; RESIDENT; READ = 1, 2 or 4: pixels an access, divides a run of a patch and a
//              row of the image, 1 for bytes where !WHOLE; VEC divides C; NORM; POSITION
// arch, bound  sm_75+ (bf16 sm_80+); memory-bound
//
// Nothing passes from lane to lane but sums of rows. A product's element k may be any pixel, as long as the weights agree:
// thread t of a group holds pixels 4 t .. 4 t + 3 of each 16 of its patch, a read of 16 bytes. Nor must column n be channel
// n: t has channels 8 t .. 8 t + 7 of each 32, a write of 16 bytes. Weights lie in shared memory in the order of the reads.
#include "common.cuh"

constexpr bool BYTES = is_same<pixel_t, unsigned char>;
constexpr int THREADS = WARPS * WARP;
constexpr int K = CIN * PH * PW;                    // pixels of a patch, in the order of the weights
constexpr int HELD = K > 48 ? 4 : ceil_div(K, 16);  // sixteens of them that a thread holds at a time
constexpr int CHUNKS = ceil_div(K, HELD * 16), STEPS = CHUNKS * HELD;
constexpr bool WHOLE = BYTES && PH == 4 && PW == 4 && CIN <= 4;  // thread t holds row t of a patch, all channels
constexpr int COLUMNS = ceil_div(C, 32), MINE = ceil_div(COLUMNS, SPLIT);  // in thirty-twos: all, a warp's
constexpr int WIDTH = COLUMNS * 32;
constexpr int PAIR = 4 / sizeof(scalar_t);  // products whose weights are 16 bytes of a lane; or of one, two
static_assert(PW * (BYTES ? CIN : 1) % READ == 0 && (READ == 1 || !BYTES || WHOLE));
static_assert(C % VEC == 0 && WARPS % SPLIT == 0);

struct Image {
    const pixel_t* x;
    int height, width, H, W, patches;
};

// Where patch r is.
struct Place {
    int w, h, b;

    DEVICE Place(int r, const Image& image) : w(r % image.W), h(r / image.W % image.H), b(r / image.W / image.H) {}

    // So many patches further on, without a division.
    DEVICE void advance(const Place& step, const Image& image) {
        w += step.w, h += step.h, b += step.b;
        if (w >= image.W) w -= image.W, ++h;
        if (h >= image.H) h -= image.H, ++b;
    }
};

// Pixels of the lane's patches, first + g and first + g + 8, as they are in memory.
struct Pixels {
    Pack<pixel_t, READ> v[HELD][2][4 / READ];
    unsigned exist = 0;  // a bit for each access

    DEVICE static int bit(int s, int half, int p) { return (s * 2 + half) * (4 / READ) + p; }

    DEVICE void ask(const Image& image, int first, const Place (&places)[2], int chunk) {
        const int lane = threadIdx.x % WARP, t = lane % 4, size = BYTES ? CIN : 1, length = image.width * size;
        exist = 0;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const bool within = first + lane / 4 + half * 8 < image.patches;
            const int x = places[half].w * PW * size, y = places[half].h * PH;
            const size_t line = static_cast<size_t>(places[half].b) * (BYTES ? 1 : CIN) * image.height + y;
            const pixel_t* from = image.x + line * length + x;
#pragma unroll
            for (int s = 0; s < HELD; ++s)
#pragma unroll
                for (int p = 0; p < 4 / READ; ++p) {
                    using Access = typename Word<sizeof(pixel_t) * READ>::type;
                    const int k = (chunk * HELD + s) * 16 + t * 4 + p * READ, c = k / (PH * PW);
                    const int i = WHOLE ? t : k / PW % PH;
                    const int j = WHOLE ? s * 4 + p * READ : BYTES ? k % PW * CIN + c : k % PW;
                    const bool inside = within && (K == STEPS * 16 || k < K) && y + i < image.height && x + j < length;
                    const int lines = (BYTES ? 0 : c * image.height) + i;  // an image has less than 2^31 pixels
                    v[s][half][p].word =
                        inside ? *reinterpret_cast<const Access*>(from + lines * length + j) : Access();
                    exist |= static_cast<unsigned>(inside) << bit(s, half, p);
                }
        }
    }

    // The lane's four of sixteen s of this chunk, for the products; affine [2][CIN] is for bytes.
    DEVICE void get(float (&to)[4], const float* affine, int chunk, int s, int half) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int at = WHOLE ? i * CIN + s : s * 4 + i;
            to[i] = to_float(v[at / 4][half][at % 4 / READ].v[at % READ]);
            if constexpr (BYTES) {
                const int k = min((chunk * HELD + s) * 16 + static_cast<int>(threadIdx.x) % 4 * 4 + i, K - 1);
                const int c = WHOLE ? s : k / (PH * PW);
                const bool inside = exist >> bit(at / 4, half, at % 4 / READ) & 1;
                const float pixel = fmaf(to[i], affine[c], affine[CIN + c]);
                to[i] = inside ? pixel : 0.0f;
            }
        }
    }
};

// 16 bytes of weights of a lane: for products j .. j + PAIR - 1 of 32 channels with sixteen s, which index / WARP counts.
// Column g of product j is channel g / 2 * 8 + j * 2 + g % 2 of the 32.
DEVICE uint4 weights_at(const scalar_t* weight, int index) {
    const int lane = index % WARP, j = index / WARP * PAIR % 4, s = index / WARP / (4 / PAIR) % STEPS;
    const int channels = index / WARP / (4 / PAIR) / STEPS * 32, k = s * 16 + lane % 4 * 4;
    Pack<scalar_t, 16 / sizeof(scalar_t)> to;
#pragma unroll
    for (int i = 0; i < PAIR; ++i) {
        const int n = channels + lane / 8 * 8 + (j + i) * 2 + lane / 4 % 2;
        Pack<scalar_t, 4> four;
        if constexpr (K % 4 == 0) {
            using Access = typename Word<sizeof(scalar_t) * 4>::type;
            const bool inside = (C % 32 == 0 || n < C) && (K == STEPS * 16 || k < K);
            four.word = inside ? *reinterpret_cast<const Access*>(weight + n * K + k) : Access();
        } else {
#pragma unroll
            for (int e = 0; e < 4; ++e)
                four.v[e] = n < C && k + e < K ? weight[n * K + k + e] : from_float<scalar_t>(0);
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) to.v[i * 4 + e] = four.v[e];
    }
    return to.word;
}

// Sums over the lanes and warps that share a row, of the lane's two rows.
DEVICE void sum_rows(float (&x)[2], float* partial) {
    x[0] = warp_sum<4>(x[0]), x[1] = warp_sum<4>(x[1]);
    if constexpr (SPLIT > 1) {
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
        __syncthreads();  // the last sums have been read
        if (lane % 4 == 0) partial[warp * 16 + lane / 4] = x[0], partial[warp * 16 + lane / 4 + 8] = x[1];
        __syncthreads();
        x[0] = x[1] = 0;
        for (int i = 0; i < SPLIT; ++i)
            for (int half = 0; half < 2; ++half)
                x[half] += partial[(warp / SPLIT * SPLIT + i) * 16 + lane / 4 + half * 8];
    }
}

extern "C" __global__ void __launch_bounds__(WARPS* WARP, BLOCKS)
    patch_embed(const pixel_t* x, const float* __restrict__ affine, const scalar_t* __restrict__ weight,
                const scalar_t* __restrict__ bias, const scalar_t* __restrict__ gamma,
                const scalar_t* __restrict__ beta, const scalar_t* __restrict__ position, scalar_t* out, int patches,
                int height, int width, int H, int W, float eps) {
    extern __shared__ __align__(16) unsigned char shared[];
    float* vectors = reinterpret_cast<float*>(shared);  // [bias, gamma, beta][WIDTH], zero beyond C
    uint4* weights = reinterpret_cast<uint4*>(vectors + 3 * WIDTH);
    constexpr int COUNT = COLUMNS * STEPS * (4 / PAIR) * WARP;
    float* channels = reinterpret_cast<float*>(weights + (RESIDENT ? COUNT : 0));  // of bytes: affine
    float* partial = channels + (BYTES ? 2 * CIN : 0);
    const Image image = {x, height, width, H, W, patches};
    const int lane = threadIdx.x % WARP, t = lane % 4, warp = threadIdx.x / WARP, share = warp % SPLIT;
    constexpr int TILE = WARPS / SPLIT * 16;  // patches of the block at a time
    int first = blockIdx.x * TILE + warp / SPLIT * 16;
    const Place step(gridDim.x * TILE, image);
    Place places[2] = {Place(first + lane / 4, image), Place(first + lane / 4 + 8, image)};

    let_next_kernel_start();
    wait_for_kernels_ahead();
    Pixels pixels;
    pixels.ask(image, first, places, 0);
    __syncthreads();  // which loads are not put off past: those of pixels and weights are under way together
#pragma unroll 12
    for (int i = 0; i < ceil_div(WIDTH, THREADS); ++i) {
        const int c = min(i * THREADS + static_cast<int>(threadIdx.x), WIDTH - 1);  // no branch: loads go together
        vectors[c] = bias && c < C ? to_float(bias[c]) : 0.0f;
        vectors[WIDTH + c] = NORM && c < C ? to_float(gamma[c]) : 0.0f;
        vectors[2 * WIDTH + c] = NORM && c < C ? to_float(beta[c]) : 0.0f;
    }
#pragma unroll 12
    for (int i = 0; i < (RESIDENT ? ceil_div(COUNT, THREADS) : 0); ++i) {
        const int at = min(i * THREADS + static_cast<int>(threadIdx.x), COUNT - 1);
        weights[at] = weights_at(weight, at);
    }
    if constexpr (BYTES)
        for (int i = threadIdx.x; i < 2 * CIN; i += THREADS) channels[i] = affine[i];
    __syncthreads();
    for (; first - warp / SPLIT * 16 < patches; first += gridDim.x * TILE) {
        asm volatile("" ::: "memory");  // what is in shared memory is not kept in registers from tile to tile
        // d[i][e / 2][half * 2 + e % 2] is channel 32 column + 8 t + e of patch first + g + 8 half
        float d[MINE][4][4];
        using Columns = float (&)[4][4];
        auto each = [&](auto f) {  // f(sums, their first channel)
#pragma unroll
            for (int i = 0; i < MINE; ++i)
                if (const int column = i * SPLIT + share; COLUMNS % SPLIT == 0 || column < COLUMNS)
                    f(d[i], column * 32 + t * 8);
        };
        each([&](Columns y, int c) {
            float b[8];
            load<8>(vectors + c, b);
#pragma unroll
            for (int e = 0; e < 16; ++e) y[e / 4][e % 4] = b[e / 4 * 2 + e % 2];
        });
#pragma unroll 1
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
#pragma unroll
            for (int s = 0; s < HELD; ++s) {
                float p[2][4];
                pixels.get(p[0], channels, chunk, s, 0), pixels.get(p[1], channels, chunk, s, 1);
                unsigned a[2][4];  // for k of 32 bytes: one product of 16-bit elements, two of floats
                if constexpr (PAIR == 2) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) a[0][i] = pack2<scalar_t>(p[i % 2][i / 2 * 2], p[i % 2][i / 2 * 2 + 1]);
                } else {
#pragma unroll
                    for (int i = 0; i < 8; ++i) a[i / 4][i % 4] = __float_as_uint(p[i % 2][i / 2]);
                }
#pragma unroll
                for (int i = 0; i < MINE; ++i) {
                    const int column = i * SPLIT + share;
                    if (COLUMNS % SPLIT && column >= COLUMNS) continue;
#pragma unroll
                    for (int j = 0; j < 4; j += PAIR) {
                        const int at = ((column * STEPS + chunk * HELD + s) * 4 + j) / PAIR * WARP + lane;
                        const uint4 w = RESIDENT ? weights[at] : weights_at(weight, at);
                        mma_step<scalar_t, true>(d[i][j], a[0], {w.x, w.y});
                        mma_step<scalar_t, true>(d[i][j + PAIR - 1], a[2 - PAIR], {w.z, w.w});
                    }
                }
            }
            // what is next is on its way from here on
            const bool last = chunk + 1 == CHUNKS;
            if (last) places[0].advance(step, image), places[1].advance(step, image);
            pixels.ask(image, last ? first + gridDim.x * TILE : first, places, last ? 0 : chunk + 1);
        }

        float rstd[2] = {};
        if constexpr (NORM) {
            float mean[2] = {};
            each([&](Columns y, int) {
#pragma unroll
                for (int e = 0; e < 16; ++e) mean[e / 2 % 2] += y[e / 4][e % 4];
            });
            sum_rows(mean, partial);
            each([&](Columns y, int c) {
#pragma unroll
                for (int e = 0; e < 16; ++e) {
                    y[e / 4][e % 4] -= mean[e / 2 % 2] * (1.0f / C);
                    if (C % 32 == 0 || c + e / 4 * 2 + e % 2 < C)
                        rstd[e / 2 % 2] = fmaf(y[e / 4][e % 4], y[e / 4][e % 4], rstd[e / 2 % 2]);
                }
            });
            sum_rows(rstd, partial);
            rstd[0] = rsqrtf(rstd[0] * (1.0f / C) + eps), rstd[1] = rsqrtf(rstd[1] * (1.0f / C) + eps);
        }
        each([&](Columns y, int c) {
            float g[8], b[8];
            load<8>(vectors + WIDTH + c, g), load<8>(vectors + 2 * WIDTH + c, b);
#pragma unroll
            for (int e = 0; e < 16; e += VEC) {
                const int r = first + lane / 4 + e / 8 * 8, n = e % 8;
                float z[VEC], p[VEC];
#pragma unroll
                for (int k = 0; k < VEC; ++k) {
                    z[k] = y[(n + k) / 2][e / 8 * 2 + (n + k) % 2];
                    if constexpr (NORM) z[k] = fmaf(z[k] * rstd[e / 8], g[n + k], b[n + k]);
                }
                if (r >= patches || (C % 32 && c + n >= C)) continue;
                if constexpr (POSITION) {
                    load<VEC>(position + static_cast<size_t>(r % (H * W)) * C + c + n, p);
#pragma unroll
                    for (int k = 0; k < VEC; ++k) z[k] += p[k];
                }
                store<VEC>(out + static_cast<size_t>(r) * C + c + n, z);
            }
        });
    }
}
