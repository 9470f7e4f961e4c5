// cutlass_gemm out[m, n] = act(sum_k a[m, k] w[n, k] + bias[n]) + residual[m, n],  act = the exact gelu where activate
// shapes       a [M, K], w [N, K] by their tensor maps; bias [N] scalar_t or null; residual, out [M, N] scalar_t;
//              residual may be null or out, and is null where activate; everything on 16 bytes
// math         products on tensor cores, fp32 sums; float: tf32 products
// grid         ceil_div(M, BM) * ceil_div(N, BN) blocks of BM / 64 warpgroups that multiply and a warp that fetches, one
//              tile [BM, BN] each, those of a row side by side; shared memory STAGES * ((BM + BN) * 128 + 16)
// constants    scalar_t = float | __half | __nv_bfloat16; BM = 64, 128, 192 or 256; BN = 32, 64, 96, 128, 192 or 256;
//              STAGES >= 2. N % 32 == 0, the bytes of K are a multiple of 16.
// arch, bound  sm_90a only, and the headers of CUTLASS; memory-bound for K < 300, then tensor cores
#include <cutlass/cutlass.h>
// CUDA 13 keeps these headers in cccl/; CuPy brings its own, without it, and two versions do not mix.
#undef CUDA_STD_HEADER
#define CUDA_STD_HEADER(header) <cuda/std/header>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>
#include <cutlass/pipeline/sm90_pipeline.hpp>

#include "common.cuh"

using Element =
    cute::conditional_t<sizeof(scalar_t) == 4, cutlass::tfloat32_t,
                        cute::conditional_t<is_same<scalar_t, __half>, cutlass::half_t, cutlass::bfloat16_t>>;

constexpr int SLAB = 128;  // bytes of k that a stage holds of each row
constexpr int BK = SLAB / sizeof(scalar_t), PACK = 16 / sizeof(scalar_t);
constexpr int CONSUMERS = BM * 2, THREADS = CONSUMERS + WARP;
constexpr int SHARED = STAGES * ((BM + BN) * SLAB + sizeof(typename cutlass::PipelineTmaAsync<1>::SharedStorage));
// Blocks of one multiprocessor at a time, so that one stores while another multiplies: what its shared memory allows,
// and its registers, enough for two warpgroups of 64 sums a thread, twice.
constexpr int BLOCKS = cute::max(1, cute::min(256 / BM * 128 / cute::max(BN, 128), 227 * 1024 / (SHARED + 1024)));
static_assert(BM % 64 == 0 && BN % 32 == 0 && STAGES >= 2);

template <int ROWS>
using Slabs = decltype(cute::tile_to_shape(cute::GMMA::Layout_K_SW128_Atom<Element>{},
                                           cute::Shape<cute::Int<ROWS>, cute::Int<BK>, cute::Int<STAGES>>{}));
using Multiply = decltype(cute::make_tiled_mma(
    cute::GMMA::ss_op_selector<Element, Element, float, cute::Shape<cute::Int<BM>, cute::Int<BN>, cute::Int<BK>>>(),
    cute::Layout<cute::Shape<cute::Int<BM / 64>, cute::_1, cute::_1>>{}));
using Pipeline = cutlass::PipelineTmaAsync<STAGES>;

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    cutlass_gemm(const __grid_constant__ cute::TmaDescriptor a, const __grid_constant__ cute::TmaDescriptor w,
                 const scalar_t* __restrict__ bias, const scalar_t* residual, scalar_t* out, int M, int N, int K,
                 bool activate) {
    extern __shared__ __align__(1024) unsigned char smem[];
    unsigned char* const weights = smem + STAGES * BM * SLAB;
    auto& barriers = *reinterpret_cast<typename Pipeline::SharedStorage*>(weights + STAGES * BN * SLAB);
    const int thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    const int tiles_n = ceil_div(N, BN), tile = blockIdx.x;
    const int m0 = tile / tiles_n * BM, n0 = tile % tiles_n * BN, slabs = ceil_div(K, BK);
    const bool producer = thread >= CONSUMERS;

    typename Pipeline::Params params;
    params.transaction_bytes = (BM + BN) * SLAB;  // zeros beyond M, N and K count
    params.role = producer ? Pipeline::ThreadCategory::Producer : Pipeline::ThreadCategory::Consumer;
    params.is_leader = producer && lane == 0;
    params.num_consumers = CONSUMERS;
    Pipeline pipeline(barriers, params, cute::Shape<cute::_1, cute::_1, cute::_1>{});
    __syncthreads();  // the barriers are there

    if (producer) {
        if (lane) return;
        const auto hint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
        auto stage = cutlass::make_producer_start_state<Pipeline>();
        for (int slab = 0; slab < slabs; ++slab, ++stage) {
            pipeline.producer_acquire(stage);
            auto* const full = pipeline.producer_get_barrier(stage);
            const int i = stage.index();
            cute::SM90_TMA_LOAD::copy(&a, full, hint, smem + i * BM * SLAB, slab * BK, m0);
            cute::SM90_TMA_LOAD::copy(&w, full, hint, weights + i * BN * SLAB, slab * BK, 0, 0, 0, n0 / (4 * PACK));
        }
        return;
    }

    const auto slabs_a = cute::make_tensor(cute::make_smem_ptr(reinterpret_cast<Element*>(smem)), Slabs<BM>{});
    const auto slabs_w = cute::make_tensor(cute::make_smem_ptr(reinterpret_cast<Element*>(weights)), Slabs<BN>{});
    Multiply multiply;
    multiply.accumulate_ = cute::GMMA::ScaleOut::One;
    // the descriptors of a warpgroup, the same in all of its threads
    const auto part = multiply.get_slice(__shfl_sync(ALL_LANES, warp / 4, 0) * 128);
    const auto x = part.make_fragment_A(part.partition_A(slabs_a));
    const auto y = part.make_fragment_B(part.partition_B(slabs_w));

    // A thread's sums: rows m + 8 h, and of each 4 PACK columns PACK neighbours, 16 bytes. The instruction's are
    // 8 j + 2 i + e, i = lane % 4, e = 0, 1, of w's rows as they lie in shared memory, where the tensor map puts row
    // PACK i + 2 j + e of each 4 PACK.
    const int m = m0 + warp * 16 + lane / 4, n = n0 + lane % 4 * PACK;
    auto sum = cute::partition_fragment_C(multiply, cute::Shape<cute::Int<BM>, cute::Int<BN>>{});
    static_assert(decltype(cute::size(sum))::value == BN / 2);
#pragma unroll
    for (int group = 0; group < BN / (4 * PACK); ++group) {
        const int column = n + group * 4 * PACK;
        float b[PACK] = {};
        if (bias && column < N) load<PACK>(bias + column, b);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = m + h * 8;
            float r[PACK] = {};
            if (residual && row < M && column < N) load<PACK>(residual + static_cast<size_t>(row) * N + column, r);
#pragma unroll
            for (int e = 0; e < PACK; ++e) sum(group * 2 * PACK + e / 2 * 4 + h * 2 + e % 2) = b[e] + r[e];
        }
    }

    typename Pipeline::PipelineState stage, last;
    auto multiply_slab = [&] {
        pipeline.consumer_wait(stage);
        cute::warpgroup_arrive();
        cute::gemm(multiply, x(cute::_, cute::_, cute::_, stage.index()), y(cute::_, cute::_, cute::_, stage.index()),
                   sum);
        cute::warpgroup_commit_batch();
        ++stage;
    };
    cute::warpgroup_fence_operand(sum);
    multiply_slab();
    for (int slab = 1; slab < slabs; ++slab) {
        multiply_slab();
        cute::warpgroup_wait<1>();  // the products of the slab before
        pipeline.consumer_release(last);
        ++last;
    }
    cute::warpgroup_wait<0>();
    cute::warpgroup_fence_operand(sum);

#pragma unroll
    for (int group = 0; group < BN / (4 * PACK); ++group)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = m + h * 8, column = n + group * 4 * PACK;
            if (row >= M || column >= N) continue;
            float z[PACK];
#pragma unroll
            for (int e = 0; e < PACK; ++e) {
                const float s = sum(group * 2 * PACK + e / 2 * 4 + h * 2 + e % 2);
                z[e] = activate ? gelu(s) : s;
            }
            store<PACK>(out + static_cast<size_t>(row) * N + column, z);
        }
}
