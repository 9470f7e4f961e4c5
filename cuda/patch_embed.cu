// patch_embed  out[b,h,w] = LN(W vec(patch[b,h,w]) + bias) + position[h,w], without the LN where !NORM;
//              patch[b,h,w][c,i,j] = pixel (h PH + i, w PW + j) of channel c, zero outside the image
// shapes       x [B, CIN, height, width] float or scalar_t, normalised pixels; or [B, height, width, CIN] unsigned char,
//              normalised here as pixel * affine[0,c] + affine[1,c], affine [2, CIN] float;
//              weight [C, CIN, PH, PW], bias, gamma, beta [C], position [H, W, C], out [B, H, W, C] scalar_t;
//              bias and position may be null. H, W are ceil(height / PH), ceil(width / PW), or the floor: pixels beyond
//              the last patch are not read.
// math         products of scalar_t on tensor cores (float: fused multiply-adds), float32 sums; float32 LayerNorm
// grid         any number of blocks of 256 threads, which take tiles of TILE patches in turn; shared memory
//              shared_bytes of ops/fused.py: pixels [TILE][STRIDE], weights, sums [TILE][C + pad]
// constants    scalar_t = float | __half | __nv_bfloat16; pixel_t; C, CIN, PH, PW; TILE = 8 (float only), 16, 32 or 64;
//              RUNS: runs of consecutive pixels that are in shared memory together, all of a patch where they fit;
//              READ: pixels an access, divides a run and a row of the image; VEC, GROUP as in rows.cuh; NORM
// arch, bound  sm_75+ (bf16 sm_80+); memory-bound on tensor cores, bound by multiply-adds in float
#include "rows.cuh"

constexpr int THREADS = 256, WARPS = THREADS / WARP;
constexpr bool BYTES = is_same<pixel_t, unsigned char>;
constexpr bool TENSOR = sizeof(scalar_t) == 2;

// A patch is SEGMENTS runs of RUN pixels that are neighbours in memory; k counts pixels of a patch in that order.
constexpr int SEGMENTS = BYTES ? PH : CIN * PH;
constexpr int RUN = BYTES ? PW * CIN : PW;
constexpr int CHUNKS = ceil_div(SEGMENTS, RUNS);
constexpr int K = ceil_div(RUNS * RUN, 16) * 16;
static_assert(RUN % READ == 0);
static_assert(THREADS % TILE == 0 && GROUP <= WARP);

// 16-bit: weights [NP][STRIDE] as ldmatrix reads them. float: weights [K][NP], neighbouring lanes take neighbouring n.
constexpr int STRIDE = K + (TENSOR ? 8 : 4);  // an odd number of 16-byte units: no bank conflicts
constexpr int NP = ceil_div(C, TENSOR ? 16 : 32) * (TENSOR ? 16 : 32);
constexpr int SUMS = ceil_div(C, 4) * 4 + 4;

// Position of pixel k of a patch in a row of the weights.
DEVICE int weight_index(int k) {
    if constexpr (!BYTES) return k;
    const int i = k / RUN, j = k % RUN / CIN, c = k % CIN;
    return (c * PH + i) * PW + j;
}

DEVICE void load_weights(scalar_t* to, const scalar_t* weight, int chunk) {
    for (int i = threadIdx.x; i < NP * K; i += THREADS) {
        const int n = i / K, k = i % K, kk = chunk * RUNS * RUN + k;
        const bool inside = n < C && k < RUNS * RUN && kk < SEGMENTS * RUN;
        const scalar_t v = inside ? weight[n * SEGMENTS * RUN + weight_index(kk)] : from_float<scalar_t>(0);
        to[TENSOR ? n * STRIDE + k : k * NP + n] = v;
    }
}

struct Image {
    const pixel_t* x;
    const float* affine;
    int height, width, H, W;
};

// Pixels of one chunk of the tile's patches; a thread stays with one patch, neighbouring lanes take neighbouring patches.
DEVICE void load_pixels(scalar_t* to, const Image& image, int row, bool inside, int chunk) {
    const int w = row % image.W, h = row / image.W % image.H, b = row / image.W / image.H;
    const int length = BYTES ? image.width * CIN : image.width;  // of a row of the image
    scalar_t* mine = to + threadIdx.x % TILE * STRIDE;
#pragma unroll 4
    for (int s = threadIdx.x / TILE; s < RUNS; s += THREADS / TILE) {
        const int segment = chunk * RUNS + s, i = segment % PH, plane = BYTES ? 0 : segment / PH, y = h * PH + i;
        const bool exists = inside && segment < SEGMENTS && y < image.height;
        const size_t line = (static_cast<size_t>(b) * (BYTES ? 1 : CIN) + plane) * image.height + y;
        const pixel_t* from = image.x + line * length + w * RUN;
#pragma unroll
        for (int j = 0; j < RUN; j += READ) {
            float v[READ] = {};
            if (exists && w * RUN + j < length) {  // READ divides length: all of v is inside or none
                load<READ>(from + j, v);
                if constexpr (BYTES) {
#pragma unroll
                    for (int k = 0; k < READ; ++k)
                        v[k] = fmaf(v[k], image.affine[(j + k) % CIN], image.affine[CIN + (j + k) % CIN]);
                }
            }
            store<READ>(mine + s * RUN + j, v);
        }
    }
    for (int k = RUNS * RUN + threadIdx.x / TILE; k < K; k += THREADS / TILE) mine[k] = from_float<scalar_t>(0);
}

// Sums of a warp: WARPS_M x WARPS_N warps, each with 16 patches and every WARPS_N-th 16 outputs.
template <typename T>
struct TensorSums {
    static constexpr int WARPS_M = TENSOR ? TILE / 16 : 1, WARPS_N = WARPS / WARPS_M;
    static constexpr int STEPS = ceil_div(NP / 16, WARPS_N);
    float d[STEPS][2][4] = {};
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, m = warp % WARPS_M * 16, n = warp / WARPS_M * 16;

    DEVICE void multiply(const T* pixels, const T* weights) {
#pragma unroll 4
        for (int k = 0; k < K; k += 16) {
            unsigned a[4];
            load_matrix_x4(a, pixels + (m + lane % 16) * STRIDE + k + lane / 16 * 8);
#pragma unroll
            for (int i = 0; i < STEPS; ++i) {
                const int at = n + i * WARPS_N * 16;
                if (at < NP) {
                    unsigned b[4];
                    load_matrix_x4(b, weights + (at + lane / 16 * 8 + lane % 8) * STRIDE + k + lane / 8 % 2 * 8);
                    mma_16x8x16<T>(d[i][0], a, {b[0], b[1]});
                    mma_16x8x16<T>(d[i][1], a, {b[2], b[3]});
                }
            }
        }
    }

    DEVICE void put(float* sums) const {
#pragma unroll
        for (int i = 0; i < STEPS; ++i)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int at = n + i * WARPS_N * 16 + j * 8 + lane % 4 * 2;
                float* p = sums + (m + lane / 4) * SUMS + at;
                if (at < C) p[0] = d[i][j][0], p[8 * SUMS] = d[i][j][2];
                if (at + 1 < C) p[1] = d[i][j][1], p[8 * SUMS + 1] = d[i][j][3];
            }
    }
};

// Sums of a thread: TILE / 8 patches (the warp's) and every 32nd output.
template <typename T>
struct ScalarSums {
    static constexpr int ROWS = TILE / WARPS, COLUMNS = NP / WARP;
    float d[ROWS][COLUMNS] = {};
    const int lane = threadIdx.x % WARP, first = threadIdx.x / WARP * ROWS;

    DEVICE void multiply(const T* pixels, const T* weights) {
#pragma unroll 2
        for (int k = 0; k < K; k += 4) {
            float a[ROWS][4];
#pragma unroll
            for (int r = 0; r < ROWS; ++r) load<4>(pixels + (first + r) * STRIDE + k, a[r]);  // the same for all lanes
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c) {
                    const float b = to_float(weights[(k + i) * NP + c * WARP + lane]);
#pragma unroll
                    for (int r = 0; r < ROWS; ++r) d[r][c] = fmaf(a[r][i], b, d[r][c]);
                }
        }
    }

    DEVICE void put(float* sums) const {
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c)
                if (c * WARP + lane < C) sums[(first + r) * SUMS + c * WARP + lane] = d[r][c];
    }
};

template <bool, typename A, typename B>
struct Choose {
    using type = A;
};
template <typename A, typename B>
struct Choose<false, A, B> {
    using type = B;
};

extern "C" __global__ void __launch_bounds__(256)
    patch_embed(const pixel_t* x, const float* __restrict__ affine, const scalar_t* __restrict__ weight,
                const scalar_t* __restrict__ bias, const scalar_t* __restrict__ gamma,
                const scalar_t* __restrict__ beta, const scalar_t* __restrict__ position, scalar_t* out, int rows,
                int height, int width, int H, int W, float eps) {
    extern __shared__ __align__(16) unsigned char shared[];
    scalar_t* pixels = reinterpret_cast<scalar_t*>(shared);
    scalar_t* weights = pixels + TILE * STRIDE;
    float* sums = reinterpret_cast<float*>(weights + NP * (TENSOR ? STRIDE : K));
    const Image image = {x, affine, height, width, H, W};

    let_next_kernel_start();
    wait_for_kernels_ahead();
    if constexpr (CHUNKS == 1) load_weights(weights, weight, 0);
    for (int first = blockIdx.x * TILE; first < rows; first += gridDim.x * TILE) {
        const int mine = first + threadIdx.x % TILE;
        typename Choose<TENSOR, TensorSums<scalar_t>, ScalarSums<scalar_t>>::type acc;
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            if (chunk) __syncthreads();  // the last chunk has been multiplied
            load_pixels(pixels, image, min(mine, rows - 1), mine < rows, chunk);
            if constexpr (CHUNKS > 1) load_weights(weights, weight, chunk);
            __syncthreads();
            acc.multiply(pixels, weights);
        }
        acc.put(sums);
        __syncthreads();
        for (int i = threadIdx.x / GROUP; i < TILE; i += THREADS / GROUP) {
            const int r = first + i;
            Row<C, VEC, GROUP> row;
            row.load_from(sums + i * SUMS);
            if (bias) row.add(bias);
            if constexpr (NORM) row.normalise(gamma, beta, eps);
            if (r < rows) {
                if (position) row.add(position + static_cast<size_t>(r % (H * W)) * C);
                row.store_to(out + static_cast<size_t>(r) * C);
            }
        }
    }
}
