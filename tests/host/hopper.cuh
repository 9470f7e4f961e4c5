// Stands in for cuda/hopper.cuh on the CPU: barriers with phases, copies of boxes with their swizzle, products that read
// shared memory as late as they may: when they are waited for. One block at a time, so no clusters.
#pragma once
#include <functional>
#include <map>

#include "more.cuh"

#define __grid_constant__
#define __cluster_dims__(...)
constexpr int WARPGROUP = 128;
constexpr unsigned ALL_LANES = ~0u;

inline unsigned __shfl_sync(unsigned, unsigned x, int lane) {
    exchange(&x, 1, [&](const unsigned* words) { x = words[lane * 8]; });
    return x;
}

namespace host {
struct Phases { int arrivals, left, bytes, parity; };
struct Products { std::vector<std::function<void()>> open; std::deque<std::vector<std::function<void()>>> groups; };
inline std::map<void*, Phases> phases;
inline std::map<int, Products> products;
inline std::map<int, Barrier> named;
inline unsigned long long high;  // of the addresses of shared memory, which kernels know by 32 bits

inline void settle(Phases& p) {
    if (p.left == 0 && p.bytes == 0) p.left = p.arrivals, p.parity ^= 1;
}
inline void arrived(void* barrier, int bytes) {
    Phases& p = phases.at(barrier);
    p.bytes -= bytes;
    settle(p);
}
}  // namespace host

// ---------------------------------------------------------------- barriers

inline void barrier_init(unsigned long long* b, unsigned arrivals) { host::phases[b] = {int(arrivals), int(arrivals), 0, 0}; }
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
template <int THREADS>
void named_barrier(unsigned id) { host::wait(host::named[id], THREADS); }
template <int THREADS>
void named_barrier_arrive(unsigned id) {
    host::Barrier& b = host::named[id];
    if (++b.count == THREADS) b.count = 0, ++b.turn;
}

// ---------------------------------------------------------------- what one block does not have

inline unsigned cluster_rank() { return 0; }
inline void cluster_barrier() { std::abort(); }
inline void cluster_arrive_relaxed() { std::abort(); }
inline void cluster_wait() { std::abort(); }
inline float load_of_cluster(const float*, unsigned) { std::abort(); }
template <int N>
void take_registers() {}
template <int N>
void give_registers() {}

// ---------------------------------------------------------------- copies

// As tests/test_wgmma_gemm_on_host.py makes it: sizes and strides (bytes) from the innermost dimension, the box's too.
struct TensorMap {
    const char* base;
    long long sizes[5], strides[5];
    int box[5], rank, itemsize;
};
inline unsigned shared_address(const void* p) {
    host::high = reinterpret_cast<unsigned long long>(p) >> 32 << 32;
    return static_cast<unsigned>(reinterpret_cast<unsigned long long>(p));
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
inline void copy_permuted_rows(void* to, const TensorMap* map, int k, int n32, unsigned long long* barrier) {
    copy(to, map, {k, 0, 0, 0, n32}, barrier);
}
inline void prefetch_map(const TensorMap*) {}

// ---------------------------------------------------------------- products

inline void wgmma_fence() {}
inline void wgmma_commit() {
    host::Products& mine = host::products[host::block.current];
    mine.groups.push_back({});
    mine.groups.back().swap(mine.open);
}
template <int PENDING>
void wgmma_wait() {
    std::deque<std::vector<std::function<void()>>>& groups = host::products[host::block.current].groups;
    for (; groups.size() > PENDING; groups.pop_front())
        for (const auto& product : groups.front()) product();
}
template <typename T, int N>
void hold(T (&)[N]) {}

template <int SWIZZLE>
unsigned long long descriptor(unsigned address) {
    static_assert(SWIZZLE == 128);
    return address >> 4;
}
template <typename T>
float element(unsigned long long descriptor, int row, int k) {
    unsigned long long at = (host::high | descriptor << 4) + row * 128 + k * sizeof(T);
    at ^= at >> 3 & 0x70;  // as the copy engine has put it
    return to_float(*reinterpret_cast<const T*>(at));
}
template <typename T, int n>
void wgmma(float (&d)[n], unsigned long long a, unsigned long long b) {
    const int thread = host::block.current % WARPGROUP, g = thread % 32 / 4, t = thread % 4;
    host::products[host::block.current].open.push_back([&d, a, b, thread, g, t] {
        for (int i = 0; i < n; ++i) {
            const int row = thread / 32 * 16 + g + i % 4 / 2 * 8, column = i / 4 * 8 + 2 * t + i % 2;
            for (int k = 0; k < int(32 / sizeof(T)); ++k) d[i] += element<T>(a, row, k) * element<T>(b, column, k);
        }
    });
}
template <typename T>
float gelu_to(float x) { return gelu(x); }
