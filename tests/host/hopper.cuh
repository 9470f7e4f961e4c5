// Stands in for cuda/hopper.cuh on the CPU: barriers with phases, copies with their swizzle, clusters of blocks, and
// products that read registers when they are issued and shared memory as late as they may: when they are waited for.
#pragma once
#include <functional>
#include <map>

#include "more.cuh"

#define __grid_constant__
#define __cluster_dims__(...)
constexpr int WARPGROUP = 128;
constexpr unsigned ALL_LANES = ~0u;

struct float4 { float x, y, z, w; };
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
template <typename T>
float2 unpack2(unsigned bits) {
    T v[2];
    std::memcpy(v, &bits, 4);
    return {to_float(v[0]), to_float(v[1])};
}
inline unsigned min(unsigned a, int b) { return std::min(a, unsigned(b)); }
inline unsigned __shfl_sync(unsigned, unsigned x, int lane) {
    exchange(&x, 1, [&](const unsigned* words) { x = words[lane * 8]; });
    return x;
}
inline float __uint_as_float(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
static float fast_tanh(float x) { return std::tanh(x); }
template <typename T>
float gelu_to(float x) { return gelu(x); }
static void copy_async16(void* to, const void* from, bool valid = true) { copy_async<16>(to, from, valid); }
template <typename T>
unsigned round2(float lo, float hi) { return pack2<T>(lo, hi); }
static void forget_origin(unsigned&) {}
static void prefetch(const void*) {}
static uint4 load_if(bool yes, const void* p) {
    uint4 x = {};
    if (yes) std::memcpy(&x, p, 16);
    return x;
}
static void store_if(bool yes, void* p, uint4 x) {
    if (yes) std::memcpy(p, &x, 16);
}
static uint2 load_now8(const void* p) {
    uint2 x;
    std::memcpy(&x, p, 8);
    return x;
}

namespace host {
struct Phases { int arrivals, left, bytes, parity; };
struct Products { std::vector<std::function<void()>> open; std::deque<std::vector<std::function<void()>>> groups; };
inline std::map<const void*, Phases> phases;
inline std::map<int, Products> products;  // a thread's
inline std::map<int, Barrier> named;
inline Barrier cluster;
inline std::map<int, int> turns;  // of the cluster's barrier, at which a thread arrived

// Kernels know shared memory by 32 bits.
inline unsigned address(const void* p) { return static_cast<unsigned>(reinterpret_cast<unsigned long long>(p)); }
inline unsigned char* place(unsigned address) {
    return reinterpret_cast<unsigned char*>(reinterpret_cast<unsigned long long>(shared(0)) >> 32 << 32 | address);
}
inline void settle(Phases& p) {
    if (p.left == 0 && p.bytes == 0) p.left = p.arrivals, p.parity ^= 1;
}
inline void arrived(const void* barrier, int bytes) {
    Phases& p = phases.at(barrier);
    p.bytes -= bytes;
    settle(p);
}
inline const bool forgets = (at_start = [] { phases.clear(), products.clear(), named.clear(), turns.clear(), cluster = {}; });
}  // namespace host

inline unsigned shared_address(const void* p) { return host::address(p); }

// ---------------------------------------------------------------- barriers

inline void barrier_init(unsigned long long* b, unsigned arrivals) {
    host::phases[b] = {int(arrivals), int(arrivals), 0, 0};
}
inline void barrier_init_fence() {}
inline void barrier_arrive(unsigned long long* b) {
    host::Phases& p = host::phases.at(b);
    if (--p.left < 0) std::abort();  // more arrivals than the phase expects
    host::settle(p);
}
inline void barrier_expect(unsigned long long* b, unsigned bytes) {
    host::phases.at(b).bytes += bytes;
    barrier_arrive(b);
}
inline void barrier_wait(unsigned long long* b, unsigned parity) {
    while (host::phases.at(b).parity == int(parity)) host::yield();
}
inline void barrier_wait_cluster(unsigned long long* b, unsigned parity) { barrier_wait(b, parity); }
template <int THREADS>
void named_barrier(unsigned id) { host::wait(host::named[host::rank() * 16 + id], THREADS); }
template <int THREADS>
void named_barrier_arrive(unsigned id) {
    host::Barrier& b = host::named[host::rank() * 16 + id];
    if (++b.count == THREADS) b.count = 0, ++b.turn;
}

// ---------------------------------------------------------------- clusters

inline unsigned cluster_rank() { return host::rank(); }
inline void cluster_arrive() {
    host::Barrier& b = host::cluster;
    host::turns[host::block.current] = b.turn;
    if (++b.count == int(host::block.fibers.size())) b.count = 0, ++b.turn;
}
inline void cluster_arrive_relaxed() { cluster_arrive(); }
inline void cluster_wait() {
    while (host::cluster.turn == host::turns[host::block.current]) host::yield();
}
inline void cluster_barrier() { cluster_arrive(), cluster_wait(); }
inline unsigned address_in_block(unsigned address, unsigned rank) {
    return host::address(host::shared(rank)) + (address - host::address(host::shared(host::rank())));
}
template <typename T>
void store_in_block(unsigned to, T x) { std::memcpy(host::place(to), &x, sizeof x); }
inline void store_async_in_block(unsigned to, float a, float b, float c, float d, unsigned barrier) {
    store_in_block(to, float4{a, b, c, d});
    host::arrived(host::place(barrier), 16);
}
inline void store_async_in_block(unsigned to, uint4 x, unsigned barrier) {
    store_in_block(to, x);
    host::arrived(host::place(barrier), 16);
}
inline float load_of_cluster(const float* p, unsigned rank) {
    return *reinterpret_cast<float*>(host::place(address_in_block(shared_address(p), rank)));
}
template <int N>
void take_registers() {}
template <int N>
void give_registers() {}

// ---------------------------------------------------------------- words and copies

inline unsigned load_shared(unsigned address) { return *reinterpret_cast<unsigned*>(host::place(address)); }
inline float4 load_shared4(const float* p) { return *reinterpret_cast<const float4*>(p); }
inline void store_shared(unsigned address, unsigned word) { *reinterpret_cast<unsigned*>(host::place(address)) = word; }
inline unsigned count_shared(unsigned* p) { return (*p)++; }
inline void fence_for_async() {}

inline void store_matrix_x4(unsigned to, unsigned r0, unsigned r1, unsigned r2, unsigned r3) {
    const unsigned words[4] = {r0, r1, r2, r3};
    exchange(words, 4, [&](const unsigned* w) {
        const int lane = host::block.current % 32;
        for (int q = 0; q < 4; ++q) store_shared(to + 4 * q, w[(lane % 8 * 4 + q) * 8 + lane / 8]);
    });
}
inline void store_matrix_x4_trans(unsigned to, unsigned r0, unsigned r1, unsigned r2, unsigned r3) {
    const unsigned words[4] = {r0, r1, r2, r3};
    exchange(words, 4, [&](const unsigned* w) {
        const int lane = host::block.current % 32, r = lane % 8;
        for (int c = 0; c < 8; ++c) {
            const unsigned word = w[(c * 4 + r / 2) * 8 + lane / 8];
            const unsigned short half = r % 2 ? word >> 16 : word;
            std::memcpy(host::place(to + 2 * c), &half, 2);
        }
    });
}
inline void store_matrix_x2_trans(unsigned to, unsigned r0, unsigned r1) {
    const unsigned words[2] = {r0, r1};
    exchange(words, 2, [&](const unsigned* w) {
        const int lane = host::block.current % 32, r = lane % 8;
        for (int c = 0; lane < 16 && c < 8; ++c) {
            const unsigned word = w[(c * 4 + r / 2) * 8 + lane / 8];
            const unsigned short half = r % 2 ? word >> 16 : word;
            std::memcpy(host::place(to + 2 * c), &half, 2);
        }
    });
}

// As tests/test_wgmma_gemm_on_host.py makes it: sizes and strides (bytes) from the innermost dimension, the box's too.
struct TensorMap {
    const char* base;
    long long sizes[5], strides[5];
    int box[5], rank, itemsize;
};
inline void copy_bulk(void* to, const void* from, unsigned bytes, unsigned long long* barrier) {
    std::memcpy(to, from, bytes);
    host::arrived(barrier, bytes);
}
inline void copy_bulk_to_blocks(void* to, const void* from, unsigned bytes, unsigned long long* barrier,
                                unsigned blocks) {
    for (unsigned i = 0; i < host::LARGEST_CLUSTER; ++i)
        if (blocks >> i & 1) {
            std::memcpy(host::place(address_in_block(shared_address(to), i)), from, bytes);
            host::arrived(host::place(address_in_block(shared_address(barrier), i)), bytes);
        }
}
inline void copy(void* to, const TensorMap* map, const long long (&corner)[5], unsigned long long* barrier) {
    int rows = 1;
    for (int d = 1; d < map->rank; ++d) rows *= map->box[d];
    for (int r = 0; r < rows; ++r) {
        long long offset = 0;
        bool inside = true;
        for (int d = 1, left = r; d < map->rank; left /= map->box[d++]) {
            const long long at = corner[d] + left % map->box[d];
            inside = inside && at < map->sizes[d];
            offset += at * map->strides[d];
        }
        for (int chunk = 0; chunk < 8; ++chunk) {
            char* place = static_cast<char*>(to) + r * 128 + (chunk ^ r % 8) * 16;
            for (int e = 0; e < 16 / map->itemsize; ++e) {
                const long long k = corner[0] + chunk * (16 / map->itemsize) + e;
                if (inside && k < map->sizes[0])
                    std::memcpy(place + e * map->itemsize, map->base + offset + k * map->itemsize, map->itemsize);
                else
                    std::memset(place + e * map->itemsize, 0, map->itemsize);
            }
        }
    }
    host::arrived(barrier, rows * 128);
}
inline void copy_box(void* to, const TensorMap* map, int inner, int outer, unsigned long long* barrier) {
    copy(to, map, {inner, outer}, barrier);
}
inline void copy_pairs(void* to, const TensorMap* map, int inner, int odd, int i, unsigned long long* barrier) {
    copy(to, map, {inner, 0, odd, i}, barrier);
}
inline void copy_permuted_rows(void* to, const TensorMap* map, int k, int i, unsigned long long* barrier) {
    copy(to, map, {k, 0, 0, 0, i}, barrier);
}
inline void prefetch_map(const TensorMap*) {}

// ---------------------------------------------------------------- products

inline void wgmma_fence() { host::warp_wait(); }  // as all of these are of whole warps: no lane runs ahead
inline void wgmma_commit() {
    host::warp_wait();
    host::Products& mine = host::products[host::block.current];
    mine.groups.push_back({});
    mine.groups.back().swap(mine.open);
}
template <int PENDING>
void wgmma_wait() {
    std::deque<std::vector<std::function<void()>>>& groups = host::products[host::block.current].groups;
    for (; groups.size() > PENDING; groups.pop_front())
        for (const auto& product : groups.front()) product();
    host::warp_wait();
}
template <typename T, int N>
void hold(T (&)[N]) {}

// A descriptor here: address / 16, then for plain ones k_stride / 16 and row_stride / 16, else the swizzle / 64.
template <int SWIZZLE>
unsigned long long descriptor(unsigned address) { return address >> 4 | SWIZZLE / 64ull << 60; }
inline unsigned long long descriptor_plain(unsigned address, int k_stride, int row_stride) {
    return address >> 4 | k_stride / 16ull << 28 | row_stride / 16ull << 44;
}
// Element (row, k), or where TRANSPOSED (k, row) of rows that run along k.
template <typename T, int TRANSPOSED>
float element(unsigned long long descriptor, int row, int k) {
    unsigned at = (descriptor & 0xfffffff) << 4;
    const int pitch = (descriptor >> 60) * 64;
    if (pitch == 0) {
        const int k_stride = (descriptor >> 28 & 0xffff) * 16, row_stride = (descriptor >> 44 & 0xffff) * 16;
        at += row / 8 * row_stride + row % 8 * 16 + k / 8 * k_stride + k % 8 * sizeof(T);
    } else {
        at += TRANSPOSED ? k * pitch + row * sizeof(T) : row * pitch + k * sizeof(T);
        at ^= at >> 3 & (pitch == 128 ? 0x70 : 0x30);  // as the copy engine has put it
    }
    return to_float(*reinterpret_cast<const T*>(host::place(at)));
}
template <typename T, int TRANSPOSED, int n, typename A>
void issue(float (&d)[n], A a, unsigned long long b, bool add) {
    const int thread = host::block.current % host::block.threads % WARPGROUP, t = thread % 4;
    host::products[host::block.current].open.push_back([&d, a, b, add, t] {
        for (int i = 0; i < n; ++i) {
            float sum = add ? d[i] : 0;
            for (int k = 0; k < int(32 / sizeof(T)); ++k)
                sum += a(i % 4 / 2, k) * element<T, TRANSPOSED>(b, i / 4 * 8 + 2 * t + i % 2, k);
            d[i] = sum;
        }
    });
}
template <typename T, int TRANSPOSED = 0, int n>
void wgmma(float (&d)[n], unsigned long long a, unsigned long long b, int add = 1) {
    const int thread = host::block.current % host::block.threads % WARPGROUP;
    const int row = thread / 32 * 16 + thread % 32 / 4;
    issue<T, TRANSPOSED>(d, [a, row](int h, int k) { return element<T, 0>(a, row + 8 * h, k); }, b, add);
}
template <typename T, int TRANSPOSED = 0, int n>
void wgmma(float (&d)[n], const unsigned (&a)[4], unsigned long long b, int add = 1) {
    std::vector<float> rows(32);  // g and g + 8, each of its four threads has two neighbours of either eight
    exchange(a, 4, [&](const unsigned* w) {
        const int first = host::block.current % 32 / 4 * 4;
        for (int h = 0; h < 2; ++h)
            for (int k = 0; k < 16; ++k) {
                T v[2];
                std::memcpy(v, &w[(first + k % 8 / 2) * 8 + k / 8 * 2 + h], 4);
                rows[h * 16 + k] = to_float(v[k % 2]);
            }
    });
    issue<T, TRANSPOSED>(d, [rows](int h, int k) { return rows[h * 16 + k]; }, b, add);
}
template <typename T, int TRANSPOSED = 0, int n, typename A>
void wgmma_first(float (&d)[n], const A& a, unsigned long long b) { wgmma<T, TRANSPOSED>(d, a, b, 0); }
