// Stands in for cuda/common.cuh where there is no GPU: g++ builds a kernel from its own source, and a block runs as one
// fiber a thread. What a warp does together (fragments, products, shuffles) is done from what its lanes deposited.
// This checks a kernel's indices, barriers and arithmetic, not the hardware's instructions.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define DEVICE static inline
static inline void wait_for_kernels_ahead() {}
static inline void let_next_kernel_start() {}
using std::max;
using std::min;

struct Index { unsigned x, y, z; };
struct float2 { float x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct uint2 { unsigned x, y; };
using __half = _Float16;
static float2 make_float2(float x, float y) { return {x, y}; }

// ---------------------------------------------------------------- threads of a block

namespace host {
struct Barrier { int count = 0, turn = 0; };
struct Copy { void* to; const void* from; int bytes; };
struct Copies { std::vector<Copy> open; std::deque<std::vector<Copy>> groups; };  // of a thread, in the order of its commits
struct Block {  // or the blocks of a cluster, whose threads follow each other
    int threads = 0;
    std::vector<Copies> copies;
    std::vector<ucontext_t> fibers;
    std::vector<std::vector<char>> stacks;
    std::vector<bool> done;
    std::vector<Barrier> warps;
    std::vector<unsigned> words;    // what each lane deposited, eight a thread
    std::vector<const void*> rows;
    std::vector<Barrier> all;  // a block's
    ucontext_t main;
    int current = 0;
    Index index;
};
inline Block block;
inline void (*body)();
inline void (*at_start)();  // of a block or cluster: other headers forget what they kept of the one before

inline void yield() { swapcontext(&block.fibers[block.current], &block.main); }
inline void wait(Barrier& b, int count) {
    const int turn = b.turn;
    if (++b.count == count) {
        b.count = 0, ++b.turn;
        return;
    }
    while (b.turn == turn) yield();
}
inline void warp_wait() { wait(block.warps[block.current / 32], 32); }
inline void start() {
    body();
    block.done[block.current] = true;
    for (;;) yield();
}
constexpr int SHARED = 1 << 18, LARGEST_CLUSTER = 16;
inline unsigned char* shared(int rank) {
    alignas(1024) static unsigned char memory[LARGEST_CLUSTER][SHARED];
    return memory[rank];
}
inline int rank() { return block.current / block.threads; }
inline void launch(Index grid, int threads, void (*kernel)(), int cluster = 1) {
    const int all = threads * cluster;
    body = kernel, block.threads = threads;
    block.fibers.resize(all), block.stacks.assign(all, std::vector<char>(1 << 17));
    block.words.resize(all * 8), block.rows.resize(all);
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; x += cluster) {
                block.index = {x, y, z}, block.all.assign(cluster, {}), block.copies.assign(all, {});
                block.done.assign(all, false), block.warps.assign(all / 32 + 1, {});
                if (at_start) at_start();
                for (int i = 0; i < all; ++i) {
                    ucontext_t& f = block.fibers[i];
                    getcontext(&f);
                    f.uc_stack.ss_sp = block.stacks[i].data(), f.uc_stack.ss_size = block.stacks[i].size();
                    makecontext(&f, start, 0);
                }
                for (int left = all; left > 0;) {
                    left = 0;
                    for (int i = 0; i < all; ++i)
                        if (!block.done[i]) {
                            ++left, block.current = i;
                            swapcontext(&block.main, &block.fibers[i]);
                        }
                }
            }
}
}  // namespace host
#define threadIdx (Index{unsigned(host::block.current % host::block.threads), 0, 0})
#define blockIdx (Index{host::block.index.x + unsigned(host::rank()), host::block.index.y, host::block.index.z})
static Index gridDim;
static void __syncthreads() { host::wait(host::block.all[host::rank()], host::block.threads); }
static void __syncwarp() { host::warp_wait(); }

// ---------------------------------------------------------------- the names of cuda/common.cuh

template <typename T>
constexpr T ceil_div(T a, T b) { return (a + b - 1) / b; }
constexpr int WARP = 32;
static float infinity() { return __builtin_huge_valf(); }
static float __fdividef(float a, float b) { return a / b; }
static float fast_exp2(float x) { return std::exp2(x); }
static float gelu(float x) { return x / 2 * (1 + std::erf(x * std::sqrt(0.5f))); }
static float gelu_of_twice(float x) { return gelu(2 * x); }
static float to_float(float x) { return x; }
static float to_float(__half x) { return float(x); }
static float to_float(unsigned char x) { return x; }
template <typename T>
T from_float(float x) { return T(x); }
static unsigned __float_as_uint(float x) {
    unsigned u;
    std::memcpy(&u, &x, 4);
    return u;
}

template <int BYTES> struct Word;
template <> struct Word<2> { using type = unsigned short; };
template <> struct Word<4> { using type = unsigned; };
template <> struct Word<8> { using type = uint2; };
template <> struct Word<16> { using type = uint4; };
template <typename T, int N>
union Pack {
    typename Word<sizeof(T) * N>::type word;
    T v[N];
};
template <int N, typename T>
void load(const T* p, float (&x)[N]) {
    for (int i = 0; i < N; ++i) x[i] = to_float(p[i]);
}
template <int N, typename T>
void store(T* p, const float (&x)[N]) {
    for (int i = 0; i < N; ++i) p[i] = from_float<T>(x[i]);
}
template <typename T>
unsigned pack2(float lo, float hi) {
    const T v[2] = {T(lo), T(hi)};
    unsigned u;
    std::memcpy(&u, v, 4);
    return u;
}
template <typename T>
float word_squares(unsigned bits) {
    T v[4 / sizeof(T)];
    std::memcpy(v, &bits, 4);
    float sum = 0;
    for (T x : v) sum += float(x) * float(x);
    return sum;
}

static uint4 load_now(const void* p) {
    uint4 x;
    std::memcpy(&x, p, 16);
    return x;
}
// Asynchronous copies arrive as late as they may: when their group is waited for.
template <int BYTES>
void copy_async(void* to, const void* from, bool valid) {
    host::block.copies[host::block.current].open.push_back({to, valid ? from : nullptr, BYTES});
}
static void copy_async_commit() {
    host::Copies& mine = host::block.copies[host::block.current];
    mine.groups.push_back({});
    mine.groups.back().swap(mine.open);
}
template <int N>
void copy_async_wait() {
    std::deque<std::vector<host::Copy>>& groups = host::block.copies[host::block.current].groups;
    for (; groups.size() > N; groups.pop_front())
        for (const host::Copy& c : groups.front())
            c.from ? std::memcpy(c.to, c.from, c.bytes) : std::memset(c.to, 0, c.bytes);
}

// Deposits a word, gives the words of all lanes of the warp; the second wait keeps them until all have read.
template <typename F>
void exchange(const unsigned* words, int count, F read) {
    host::Block& b = host::block;
    const int me = b.current;
    std::copy(words, words + count, &b.words[me * 8]);
    host::warp_wait();
    read(&b.words[me / 32 * 32 * 8]);
    host::warp_wait();
}
template <int LANES, typename F>
float reduce(float x, F combine) {
    const unsigned bits = __float_as_uint(x);
    float result = 0;
    exchange(&bits, 1, [&](const unsigned* words) {
        const int first = host::block.current % 32 / LANES * LANES;
        for (int i = 0; i < LANES; ++i) {
            float y;
            std::memcpy(&y, &words[(first + i) * 8], 4);
            result = i ? combine(result, y) : y;
        }
    });
    return result;
}
template <int LANES = 32>
float warp_sum(float x) { return reduce<LANES>(x, [](float a, float b) { return a + b; }); }
template <int LANES = 32>
float warp_max(float x) { return reduce<LANES>(x, [](float a, float b) { return std::max(a, b); }); }

static void load_matrix_x4(unsigned (&r)[4], const void* row) {
    host::Block& b = host::block;
    const int me = b.current, first = me / 32 * 32, lane = me % 32;
    b.rows[me] = row;
    host::warp_wait();
    for (int i = 0; i < 4; ++i)
        std::memcpy(&r[i], static_cast<const char*>(b.rows[first + i * 8 + lane / 4]) + lane % 4 * 4, 4);
    host::warp_wait();
}
static void load_matrix_x4_trans(unsigned (&r)[4], const void* row) {
    host::Block& b = host::block;
    const int me = b.current, first = me / 32 * 32, lane = me % 32;
    b.rows[me] = row;
    host::warp_wait();
    for (int i = 0; i < 4; ++i)
        for (int e = 0; e < 2; ++e)
            std::memcpy(reinterpret_cast<char*>(&r[i]) + 2 * e,
                        static_cast<const char*>(b.rows[first + i * 8 + lane % 4 * 2 + e]) + lane / 4 * 2, 2);
    host::warp_wait();
}

// Fragments as cuda/common.cuh draws them: a word holds one float or two 16-bit elements.
template <typename T, bool EXACT>
void mma_step(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    const unsigned words[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    exchange(words, 6, [&](const unsigned* w) {
        const int lane = host::block.current % 32, g = lane / 4, t = lane % 4;
        for (int e = 0; e < 4; ++e)
            for (int half = 0; half < 2; ++half)
                for (int u = 0; u < 4; ++u) {
                    T x[4 / sizeof(T)], y[4 / sizeof(T)];
                    std::memcpy(x, &w[(g * 4 + u) * 8 + half * 2 + e / 2], 4);
                    std::memcpy(y, &w[((t * 2 + e % 2) * 4 + u) * 8 + 4 + half], 4);
                    for (unsigned i = 0; i < 4 / sizeof(T); ++i) d[e] += float(x[i]) * float(y[i]);
                }
    });
}
