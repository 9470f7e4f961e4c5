// gemm         out[m, n] = act(sum_k a[m, k] w[n, k] + bias[n]) + residual[m, n],  act = the exact gelu where GELU
// shapes       a [M, K], w [N, K], residual, out [M, N] scalar_t; bias [N] scalar_t or null; residual may be null or out
// math         products on tensor cores, fp32 sums; float: three tf32 products (fp32) where EXACT, one (tf32) else
// grid         ceil_div(M, BM) * ceil_div(N, BN) blocks of BM / WM * (BN / WN) warps, one tile [BM, BN] each, those of a
//              row side by side; shared memory STAGES * (BM + BN) * 128
// constants    scalar_t = float | __half | __nv_bfloat16; GELU (residual null), EXACT; BM % WM == 0, WM % 16 == 0,
//              BN % WN == 0, WN % 32 == 0; STAGES >= 2. The bytes of K and of N are multiples of 16, N of 8.
// arch, bound  sm_75+ (bf16 sm_80+, float without tensor cores on 7.5); memory-bound for K < 300, then tensor cores
#include "common.cuh"

constexpr int SLAB = 128;          // bytes of k that a stage holds of each row
constexpr int CHUNKS = SLAB / 16;  // what one thread copies, and ldmatrix reads of one row
constexpr int STEPS = SLAB / 32;   // mma_step takes 32 bytes of k
constexpr int COPY = 16 / sizeof(scalar_t);
constexpr int WARPS_M = BM / WM, WARPS_N = BN / WN, THREADS = WARPS_M * WARPS_N * WARP;
// Blocks of one multiprocessor at a time, so that one stores while another multiplies: what its registers allow.
constexpr int BLOCKS = (EXACT || WM * WN > 2048 ? 256 : WM * WN > 1024 ? 512 : 640) / THREADS;
static_assert(BM % WM == 0 && WM % 16 == 0 && BN % WN == 0 && WN % 32 == 0 && STAGES >= 2);

// Byte offset of a chunk in a tile of rows of 128 bytes: chunks are permuted so that the eight rows of one ldmatrix
// lie in different banks. Those are r .. r + 7 of a, and r, r + 1, r + 8, r + 9, ... of w (see `columns`).
DEVICE unsigned a_offset(unsigned row, unsigned chunk) { return row * SLAB + (chunk ^ row % 8) * 16; }
DEVICE unsigned w_offset(unsigned row, unsigned chunk) {
    return row * SLAB + (chunk ^ (row / 8 % 4 * 2 + row % 2)) * 16;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    gemm(const scalar_t* a, const scalar_t* __restrict__ w, const scalar_t* __restrict__ bias, const scalar_t* residual,
         scalar_t* out, int M, int N, int K) {
    extern __shared__ __align__(128) unsigned char smem[];
    const unsigned thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    const int tiles_n = ceil_div(N, BN), tile = blockIdx.x;
    const int m0 = tile / tiles_n * BM, n0 = tile % tiles_n * BN;
    const int slabs = ceil_div<int>(K * sizeof(scalar_t), SLAB), steps = ceil_div<int>(K * sizeof(scalar_t), 32);

    // A thread copies one chunk of every (THREADS / CHUNKS)th row of each tile; zeros beyond M, N and K.
    const unsigned from_row = thread / CHUNKS, from_k = thread % CHUNKS * COPY;
    const scalar_t* from_a = a + static_cast<size_t>(m0 + from_row) * K + from_k;
    const scalar_t* from_w = w + static_cast<size_t>(n0 + from_row) * K + from_k;
    auto copy = [&](int slab) {
        unsigned char* to = smem + slab % STAGES * (BM + BN) * SLAB;
        const int k = slab * (SLAB / sizeof(scalar_t));
        const bool inside = from_k + k < K;
#pragma unroll
        for (int i = 0; i < BM; i += THREADS / CHUNKS) {
            const bool valid = inside && m0 + from_row + i < M;
            if (BM % (THREADS / CHUNKS) && from_row + i >= BM) break;
            copy_async<16>(to + a_offset(from_row + i, thread % CHUNKS), valid ? from_a + (i * K + k) : a, valid);
        }
        to += BM * SLAB;
#pragma unroll
        for (int i = 0; i < BN; i += THREADS / CHUNKS) {
            const bool valid = inside && n0 + from_row + i < N;
            if (BN % (THREADS / CHUNKS) && from_row + i >= BN) break;
            copy_async<16>(to + w_offset(from_row + i, thread % CHUNKS), valid ? from_w + (i * K + k) : w, valid);
        }
    };
    let_next_kernel_start();
    wait_for_kernels_ahead();
#pragma unroll
    for (int slab = 0; slab < STAGES - 1; ++slab) {
        if (slab < slabs) copy(slab);
        copy_async_commit();
    }

    // A thread's sums: rows m + 16 i + 8 h, and of each 32 columns eight neighbours, so that it reads and writes packs
    // of eight: its columns of four neighbouring products [16, 8] are 8 (lane % 4) + 2 j + (0, 1), j the product.
    const int m = m0 + warp % WARPS_M * WM + lane / 4, n = n0 + warp / WARPS_M * WN + lane % 4 * 8;
    float sum[WM / 16][WN / 8][4];
#pragma unroll
    for (int group = 0; group < WN / 32; ++group) {
        const int column = n + group * 32;
        float b[8] = {};
        if (bias && column < N) load<8>(bias + column, b);
#pragma unroll
        for (int i = 0; i < WM / 16; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int row = m + i * 16 + h * 8;
                float r[8] = {};
                if (!GELU && residual && row < M && column < N)
                    load<8>(residual + static_cast<size_t>(row) * N + column, r);
#pragma unroll
                for (int e = 0; e < 8; ++e) sum[i][group * 4 + e / 2][h * 2 + e % 2] = b[e] + r[e];
            }
    }

    const unsigned a_row = warp % WARPS_M * WM + lane % 16, a_chunk = lane / 16;
    const unsigned columns =
        lane % 8 / 2 * 8 + lane / 16 * 2 + lane % 2;  // row of w in its 32: tile lane / 16, column lane % 8
    const unsigned w_row = warp / WARPS_M * WN + columns, w_chunk = lane / 8 % 2;
    for (int slab = 0; slab < slabs; ++slab) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();  // the slab is there, and the one before it has been read by all
        if (slab + STAGES - 1 < slabs) copy(slab + STAGES - 1);
        copy_async_commit();
        const unsigned char* rows = smem + slab % STAGES * (BM + BN) * SLAB;
        const unsigned char* weights = rows + BM * SLAB;
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            if (slab * STEPS + step >= steps) break;
            unsigned x[WM / 16][4], y[WN / 16][4];
#pragma unroll
            for (int i = 0; i < WM / 16; ++i) load_matrix_x4(x[i], rows + a_offset(a_row + i * 16, 2 * step + a_chunk));
#pragma unroll
            for (int j = 0; j < WN / 16; ++j)
                load_matrix_x4(y[j], weights + w_offset(w_row + j / 2 * 32 + j % 2 * 4, 2 * step + w_chunk));
#pragma unroll
            for (int j = 0; j < WN / 8; ++j) {
                const unsigned b[2] = {y[j / 2][j % 2 * 2], y[j / 2][j % 2 * 2 + 1]};
#pragma unroll
                for (int i = 0; i < WM / 16; ++i) mma_step<scalar_t, EXACT>(sum[i][j], x[i], b);
            }
        }
    }

#pragma unroll
    for (int group = 0; group < WN / 32; ++group)
#pragma unroll
        for (int i = 0; i < WM / 16; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int row = m + i * 16 + h * 8, column = n + group * 32;
                if (row >= M || column >= N) continue;
                float z[8];
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    const float s = sum[i][group * 4 + e / 2][h * 2 + e % 2];
                    z[e] = GELU ? gelu(s) : s;
                }
                store<8>(out + static_cast<size_t>(row) * N + column, z);
            }
}
