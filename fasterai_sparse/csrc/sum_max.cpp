// sum_max: like a matrix product with max in place of times, out[i][j] = sum over r of max(h[i][r], x[j][r]). The
// permutation search spends its time here. The interface is plain C, which Python loads with ctypes. The function
// `sum_max_torch` (nbs/utils/06_native) is the specification.
#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>
#include "export.h"

namespace {

using Kernel = void (*)(const float*, const float*, float*, int64_t, int64_t, int, int);

#if defined(__GNUC__)
#define NAME tile_4
#define WIDTH 4
#define TARGET
#include "sum_max.inc"
#undef NAME
#undef WIDTH
#undef TARGET
#if defined(__x86_64__)
#define NAME tile_avx2
#define WIDTH 8
#define TARGET __attribute__((target("avx2")))
#include "sum_max.inc"
#undef NAME
#undef WIDTH
#undef TARGET
#define NAME tile_avx512
#define WIDTH 16
#define TARGET __attribute__((target("avx512f")))
#include "sum_max.inc"
#endif
#else
void tile_1(const float* h, const float* x, float* out, int64_t ld, int64_t nc, int ni, int nj) {
    for (int i = 0; i < ni; i++) for (int j = 0; j < nj; j++) {
        float sum = 0;
        for (int64_t r = 0; r < ld; r++) sum += std::max(h[i*ld+r], x[j*ld+r]);
        out[i*nc + j] = sum;
    }
}
#endif

struct TileSet { const char* name; Kernel tile; };

// The instruction sets that this processor has, the best first
struct TileSets {
    TileSet found[3];
    int n = 0;

    TileSets() {
#if defined(__GNUC__)
#if defined(__x86_64__)
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx512f")) found[n++] = {"avx512", tile_avx512};
        if (__builtin_cpu_supports("avx2")) found[n++] = {"avx2", tile_avx2};
#endif
        found[n++] = {"128-bit vectors", tile_4};
#else
        found[n++] = {"scalar", tile_1};
#endif
    }
};

// The `i`th best set, or a null pointer
const TileSet* tile_set(int i) {
    static const TileSets sets;
    return i >= 0 && i < sets.n ? &sets.found[i] : nullptr;
}

void sum_max(const float* h, const float* x, float* out, int64_t nh, int64_t nc, int64_t ld, Kernel tile, int threads) {
    // So many rows of x stay in the cache while all rows of h are read
    const int64_t panel = std::max<int64_t>(4, 98304/ld/4*4);
    auto work = [=](int64_t from, int64_t to) {
        for (int64_t j0 = from; j0 < to; j0 += panel)
            for (int64_t i = 0; i < nh; i += 4)
                for (int64_t j = j0; j < std::min(to, j0+panel); j += 4) {
                    const int rows = (int)std::min<int64_t>(4, nh-i), columns = (int)std::min<int64_t>(4, to-j);
                    tile(h + i*ld, x + j*ld, out + i*nc + j, ld, nc, rows, columns);
                }
    };
    const int64_t most = nh*nc*ld >> 21;   // one thread for about a millisecond of work
    const int64_t n = std::max<int64_t>(1, std::min<int64_t>({(int64_t)threads, most, (nc+3)/4}));
    const int64_t step = ((nc+n-1)/n + 3)/4*4;
    std::vector<std::thread> others;
    others.reserve(n);
    // Each thread computes `step` columns of the result. The calling thread computes the first ones, and the rest where
    // the system refuses a thread
    int64_t from = step;
    for (; from < nc; from += step) {
        const int64_t to = std::min(nc, from+step);
        if (!started(others, [=] { work(from, to); })) break;
    }
    work(0, std::min(nc, step));
    if (from < nc) work(from, nc);
    for (auto& t : others) t.join();
}

}

// Name of the `i`th best instruction set here, or a null pointer
EXPORT const char* fs_instruction_set(int i) noexcept {
    const TileSet* set = tile_set(i);
    return set ? set->name : nullptr;
}

// `out` (nh×nc) from `h` (nh×ld) and `x` (nc×ld), all row by row; ld is a multiple of 16. Uses the `which`th best
// instruction set, and at most `threads` threads. Returns an Outcome
EXPORT int fs_sum_max(const float* h, const float* x, float* out, int64_t nh, int64_t nc, int64_t ld, int which,
                      int threads) noexcept {
    const TileSet* set = tile_set(which);
    if (!set) return NO_INSTRUCTION_SET;
    return outcome_of([&] { sum_max(h, x, out, nh, nc, ld, set->tile, threads); });
}
