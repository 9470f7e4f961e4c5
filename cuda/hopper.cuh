// What kernels of SM 9.0 share: barriers in shared memory, clusters, the copy engine, a warpgroup's products.
// Only kernels that are built for sm_90a include this.
#pragma once
#include "common.cuh"

constexpr int WARPGROUP = 128;

// ---------------------------------------------------------------- barriers in shared memory
//
// A barrier's phase ends when all arrivals and all bytes that it expects have come; phases have parity 0, 1, 0, ...

DEVICE void barrier_init(unsigned long long* barrier, unsigned arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// After the inits, before other threads and the copy engine use the barriers; __syncthreads() comes on top.
DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void barrier_arrive(unsigned long long* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrive, and expect so many bytes of copies.
DEVICE void barrier_expect(unsigned long long* barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
// Wait until the phase of this parity is over.
DEVICE void barrier_wait(unsigned long long* barrier, unsigned parity) {
    asm volatile(
        "{\n.reg .pred done;\nWAIT_%=:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra "
        "WAIT_%=;\n}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}
// A barrier of the hardware for part of a block: ID 1..15 (0 is __syncthreads), THREADS a multiple of 32.
template <int THREADS>
DEVICE void named_barrier(unsigned id) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(THREADS) : "memory");
}
template <int THREADS>
DEVICE void named_barrier_arrive(unsigned id) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "n"(THREADS) : "memory");
}

// ---------------------------------------------------------------- clusters of blocks

// All threads of all blocks of the cluster; what they wrote before, to shared memory too, is seen after it.
DEVICE void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The same in two steps: what a thread does between them, it does while others are still on their way.
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
// The same where nothing that was stored is to be seen, and so without the wait for it, a thousand cycles.
DEVICE void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
DEVICE unsigned cluster_rank() {
    unsigned rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
// The address, in block `rank` of the cluster, of what lies at this address of shared memory here.
DEVICE unsigned address_in_block(unsigned address, unsigned rank) {
    unsigned there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}
DEVICE void store_in_block(unsigned to, uint4 x) {
    asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                 : "memory");
}
DEVICE void store_in_block(unsigned to, float2 x) {
    asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(x.x), "f"(x.y) : "memory");
}
// 16 bytes, which count as bytes at a barrier of that block; both are addresses as address_in_block gives.
DEVICE void store_async_in_block(unsigned to, float a, float b, float c, float d, unsigned barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
                 "f"(a), "f"(b), "f"(c), "f"(d), "r"(barrier)
                 : "memory");
}
DEVICE void store_async_in_block(unsigned to, uint4 x, unsigned barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
                 "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(barrier)
                 : "memory");
}
// As barrier_wait, and what other blocks of the cluster stored is seen.
DEVICE void barrier_wait_cluster(unsigned long long* barrier, unsigned parity) {
    asm volatile(
        "{\n.reg .pred done;\nWAIT_%=:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], "
        "%1;\n@!done bra WAIT_%=;\n}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}
// What block `rank` of the cluster has where this block has *p.
DEVICE float load_of_cluster(const float* p, unsigned rank) {
    float x;
    asm volatile("{\n.reg .u32 there;\nmapa.shared::cluster.u32 there, %1, %2;\nld.shared::cluster.f32 %0, [there];\n}"
                 : "=f"(x)
                 : "r"(shared_address(p)), "r"(rank)
                 : "memory");
    return x;
}

// ---------------------------------------------------------------- copies by the copy engine

struct TensorMap {  // CUtensorMap, a __grid_constant__ parameter
    alignas(64) unsigned long long words[16];
};

// Linear, to shared memory; addresses and bytes are multiples of 16. Counts as bytes at the barrier.
DEVICE void copy_bulk(void* to, const void* from, unsigned bytes, unsigned long long* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}
// The same to where it lies in all of these blocks of the cluster, bit i for block i; it counts at the barrier of each.
DEVICE void copy_bulk_to_blocks(void* to, const void* from, unsigned bytes, unsigned long long* barrier,
                                unsigned blocks) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
        "%4;" ::"r"(shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(barrier)), "h"(static_cast<unsigned short>(blocks))
        : "memory");
}
// A box of a two-dimensional tensor map, its inner coordinate first.
DEVICE void copy_box(void* to, const TensorMap* map, int inner, int outer, unsigned long long* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
        "[%2];" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(inner), "r"(outer)
        : "memory");
}
// A box of a map [H / 2, 2, W / 2, 2 C] (ops/tensor_maps.py): of its rows 2 i + odd, 2 (i + 1) + odd, ... all columns.
DEVICE void copy_pairs(void* to, const TensorMap* map, int inner, int odd, int i, unsigned long long* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(inner), "r"(0), "r"(odd), "r"(i)
        : "memory");
}
// A box of rows of a map that permutes each 32 of 16 bits, each 16 of floats (ops/tensor_maps.py), from group i on.
DEVICE void copy_permuted_rows(void* to, const TensorMap* map, int k, int i, unsigned long long* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%3, %4, %4, %4, %5}], [%2];" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(k), "r"(0), "r"(i)
        : "memory");
}
DEVICE void prefetch_map(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// Ordinary stores to shared memory become visible to the copy engine and to wgmma; a barrier must follow.
DEVICE void fence_for_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Four 8 x 8 matrices of 16-bit elements to shared memory; lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void store_matrix_x4(unsigned to, unsigned r0, unsigned r1, unsigned r2, unsigned r3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(r0), "r"(r1),
                 "r"(r2), "r"(r3)
                 : "memory");
}

// The same, each transposed on the way.
DEVICE void store_matrix_x4_trans(unsigned to, unsigned r0, unsigned r1, unsigned r2, unsigned r3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(r0), "r"(r1),
                 "r"(r2), "r"(r3)
                 : "memory");
}

// Two matrices, each transposed on the way; lanes 0..15 give the addresses.
DEVICE void store_matrix_x2_trans(unsigned to, unsigned r0, unsigned r1) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to), "r"(r0), "r"(r1)
                 : "memory");
}

// Bring the 128 bytes around p into the second level cache.
DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// ---------------------------------------------------------------- single words
//
// As written: the compiler neither moves nor merges them.

DEVICE unsigned load_shared(unsigned address) {
    unsigned word;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address));
    return word;
}
DEVICE float4 load_shared4(const float* p) {
    float4 x;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(shared_address(p)));
    return x;
}
DEVICE void store_shared(unsigned address, unsigned word) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(word) : "memory");
}
// *p in shared memory before 1 is added to it; orders what its block's threads did before and do after.
DEVICE unsigned count_shared(unsigned* p) {
    unsigned before;
    asm volatile("atom.acq_rel.cta.shared.add.u32 %0, [%1], 1;" : "=r"(before) : "r"(shared_address(p)) : "memory");
    return before;
}
DEVICE uint2 load_now8(const void* p) {
    uint2 x;
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(p));
    return x;
}

// 16 bytes of global memory where `yes`, else zeros, and to it: without branches, so that those of a loop overlap.
DEVICE uint4 load_if(bool yes, const void* p) {
    uint4 x;
    asm volatile(
        "{\n.reg .pred yes;\nsetp.ne.b32 yes, %5, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
        "@yes ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
        : "=&r"(x.x), "=&r"(x.y), "=&r"(x.z), "=&r"(x.w)
        : "l"(p), "r"(int(yes)));
    return x;
}
DEVICE void store_if(bool yes, void* p, uint4 x) {
    asm volatile(
        "{\n.reg .pred yes;\nsetp.ne.b32 yes, %5, 0;\n@yes st.global.v4.u32 [%4], {%0, %1, %2, %3};\n}" ::"r"(x.x),
        "r"(x.y), "r"(x.z), "r"(x.w), "l"(p), "r"(int(yes)));
}

// ---------------------------------------------------------------- registers

template <int N>
DEVICE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
DEVICE void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// The compiler forgets where this number came from: what depends on it in a loop is computed there, not kept in
// registers from before the loop.
DEVICE void forget_origin(unsigned& x) { asm volatile("" : "+r"(x)); }

// Two floats as the 32 bits of two 16-bit elements in one instruction; pack2 of common.cuh takes three.
template <typename T>
DEVICE unsigned round2(float lo, float hi) {
    unsigned bits;
    if constexpr (is_same<T, __half>)
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(hi), "f"(lo));
    else
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(hi), "f"(lo));
    return bits;
}

// ---------------------------------------------------------------- products of a warpgroup
//
// wgmma, D[64, N] += A[64, K] B[K, N], K = 16 of 16-bit elements, 8 of floats that the copy engine rounded to tf32. Warp w of the warpgroup has rows 16 w .. 16 w + 15; its
// lane of group g = lane / 4 and thread t = lane % 4 holds, of each eight columns j, d[4 j + 0, 1] = D[g][8 j + 2 t, + 1]
// and d[4 j + 2, 3] = D[g + 8][the same]; A in registers is as in mma_16x8x16.
//
// Order: fence (registers were written), products, commit, wait. Accumulators and A's registers must not be touched in
// between; hold() after a wait keeps the compiler from reading them before it.

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
template <int N>
DEVICE void hold(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int N>
DEVICE void hold(unsigned (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

// Descriptor of an operand in shared memory whose rows are K-major pieces of SWIZZLE bytes (128, 64 or 32), eight rows
// after each other; the tile's address is a multiple of 8 * SWIZZLE. Within a piece the next 16 elements are at + 2.
template <int SWIZZLE>
DEVICE unsigned long long descriptor(unsigned address) {
    constexpr unsigned long long mode = SWIZZLE == 128 ? 1 : SWIZZLE == 64 ? 2 : 3;
    return (address & 0x3ffffull) >> 4 | 1ull << 16 | static_cast<unsigned long long>(8 * SWIZZLE / 16) << 32 |
           mode << 62;
}

// The same without a swizzle: 8 x 8 pieces of 128 bytes, k_stride bytes from one to the next along k and row_stride
// along the rows, both multiples of 16.
DEVICE unsigned long long descriptor_plain(unsigned address, int k_stride, int row_stride) {
    return (address & 0x3ffffull) >> 4 | static_cast<unsigned long long>(k_stride / 16) << 16 |
           static_cast<unsigned long long>(row_stride / 16) << 32;
}

#define WGMMA_D8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define WGMMA_D12 WGMMA_D8 ", %8, %9, %10, %11"
#define WGMMA_D16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_D28 \
    WGMMA_D16     \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27"
#define WGMMA_D24 WGMMA_D16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define WGMMA_D32 \
    WGMMA_D16     \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_D48 \
    WGMMA_D32     \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_D64 \
    WGMMA_D48     \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_D96                                                                      \
    WGMMA_D64                                                                          \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_D128                                                                                 \
    WGMMA_D96                                                                                      \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define WGMMA_4(C, d, i) C(d[i]), C(d[i + 1]), C(d[i + 2]), C(d[i + 3])
#define WGMMA_S16(C, d, i) WGMMA_4(C, d, i), WGMMA_4(C, d, i + 4), WGMMA_4(C, d, i + 8), WGMMA_4(C, d, i + 12)
#define WGMMA_R8(C, d) WGMMA_4(C, d, 0), WGMMA_4(C, d, 4)
#define WGMMA_R12(C, d) WGMMA_R8(C, d), WGMMA_4(C, d, 8)
#define WGMMA_R16(C, d) WGMMA_S16(C, d, 0)
#define WGMMA_R24(C, d) WGMMA_R16(C, d), WGMMA_4(C, d, 16), WGMMA_4(C, d, 20)
#define WGMMA_R28(C, d) WGMMA_R16(C, d), WGMMA_4(C, d, 16), WGMMA_4(C, d, 20), WGMMA_4(C, d, 24)
#define WGMMA_R32(C, d) WGMMA_R16(C, d), WGMMA_S16(C, d, 16)
#define WGMMA_R48(C, d) WGMMA_R32(C, d), WGMMA_S16(C, d, 32)
#define WGMMA_R64(C, d) WGMMA_R48(C, d), WGMMA_S16(C, d, 48)
#define WGMMA_R96(C, d) WGMMA_R64(C, d), WGMMA_S16(C, d, 64), WGMMA_S16(C, d, 80)
#define WGMMA_R128(C, d) WGMMA_R96(C, d), WGMMA_S16(C, d, 96), WGMMA_S16(C, d, 112)

// The instruction: N columns, n of them sums a thread, C "+f" (add to them) or "=f" (write them); operands from %n on.
#define WGMMA_SS(N, n, C, STEP, TYPE, a_at, b_at, add_at, trans)                                   \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " add_at                                    \
                 ", 0;\n"                                                                          \
                 "wgmma.mma_async.sync.aligned.m64n" #N STEP ".f32." TYPE "." TYPE " {" WGMMA_D##n \
                 "}, " a_at ", " b_at ", add, 1, 1" trans ";\n}"                                   \
                 : WGMMA_R##n(C, d)                                                                \
                 : "l"(a), "l"(b), "r"(add), "n"(TRANSPOSED))
#define WGMMA_RS(N, n, C, TYPE, a_at, b_at, add_at, trans_at)                                    \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " add_at                                  \
                 ", 0;\n"                                                                        \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" WGMMA_D##n \
                 "}, {" a_at "}, " b_at ", add, 1, 1, " trans_at ";\n}"                          \
                 : WGMMA_R##n(C, d)                                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(TRANSPOSED))

// wgmma(d, a, b, add): d = a b + (add ? d : 0). wgmma_first(d, a, b): d = a b, the sums before do not matter, nor cost registers.
// a is a descriptor or four registers (16-bit elements), b a descriptor of [N, K], or of [K, N] where TRANSPOSED.
#define WGMMA(N, n, ss0, ss1, ss2, ss3, rs0, rs1, rs2, rs3)                                       \
    template <typename T, int TRANSPOSED = 0>                                                     \
    DEVICE void wgmma(float (&d)[n], unsigned long long a, unsigned long long b, int add = 1) {   \
        if constexpr (is_same<T, __half>)                                                         \
            WGMMA_SS(N, n, "+f", "k16", "f16", ss0, ss1, ss2, ", 0, " ss3);                       \
        else if constexpr (is_same<T, float>)                                                     \
            WGMMA_SS(N, n, "+f", "k8", "tf32", ss0, ss1, ss2, "");                                \
        else                                                                                      \
            WGMMA_SS(N, n, "+f", "k16", "bf16", ss0, ss1, ss2, ", 0, " ss3);                      \
    }                                                                                             \
    template <typename T, int TRANSPOSED = 0>                                                     \
    DEVICE void wgmma_first(float (&d)[n], unsigned long long a, unsigned long long b) {          \
        const int add = 0;                                                                        \
        if constexpr (is_same<T, __half>)                                                         \
            WGMMA_SS(N, n, "=f", "k16", "f16", ss0, ss1, ss2, ", 0, " ss3);                       \
        else if constexpr (is_same<T, float>)                                                     \
            WGMMA_SS(N, n, "=f", "k8", "tf32", ss0, ss1, ss2, "");                                \
        else                                                                                      \
            WGMMA_SS(N, n, "=f", "k16", "bf16", ss0, ss1, ss2, ", 0, " ss3);                      \
    }                                                                                             \
    template <typename T, int TRANSPOSED = 0>                                                     \
    DEVICE void wgmma(float (&d)[n], const unsigned (&a)[4], unsigned long long b, int add = 1) { \
        if constexpr (is_same<T, __half>)                                                         \
            WGMMA_RS(N, n, "+f", "f16", rs0, rs1, rs2, rs3);                                      \
        else                                                                                      \
            WGMMA_RS(N, n, "+f", "bf16", rs0, rs1, rs2, rs3);                                     \
    }                                                                                             \
    template <typename T, int TRANSPOSED = 0>                                                     \
    DEVICE void wgmma_first(float (&d)[n], const unsigned (&a)[4], unsigned long long b) {        \
        const int add = 0;                                                                        \
        if constexpr (is_same<T, __half>)                                                         \
            WGMMA_RS(N, n, "=f", "f16", rs0, rs1, rs2, rs3);                                      \
        else                                                                                      \
            WGMMA_RS(N, n, "=f", "bf16", rs0, rs1, rs2, rs3);                                     \
    }
WGMMA(16, 8, "%8", "%9", "%10", "%11", "%8, %9, %10, %11", "%12", "%13", "%14")
WGMMA(24, 12, "%12", "%13", "%14", "%15", "%12, %13, %14, %15", "%16", "%17", "%18")
WGMMA(32, 16, "%16", "%17", "%18", "%19", "%16, %17, %18, %19", "%20", "%21", "%22")
WGMMA(56, 28, "%28", "%29", "%30", "%31", "%28, %29, %30, %31", "%32", "%33", "%34")
WGMMA(48, 24, "%24", "%25", "%26", "%27", "%24, %25, %26, %27", "%28", "%29", "%30")
WGMMA(64, 32, "%32", "%33", "%34", "%35", "%32, %33, %34, %35", "%36", "%37", "%38")
WGMMA(96, 48, "%48", "%49", "%50", "%51", "%48, %49, %50, %51", "%52", "%53", "%54")
WGMMA(128, 64, "%64", "%65", "%66", "%67", "%64, %65, %66, %67", "%68", "%69", "%70")
WGMMA(192, 96, "%96", "%97", "%98", "%99", "%96, %97, %98, %99", "%100", "%101", "%102")
WGMMA(256, 128, "%128", "%129", "%130", "%131", "%128, %129, %130, %131", "%132", "%133", "%134")
