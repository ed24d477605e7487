// Runs a network whose weights are mostly zero: a list of operations on activations that lie flat (engine.inc). A plain C interface, loaded with ctypes;
// the list is made by the engine's notebook, whose `run_torch` is the specification of each operation.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include "export.h"

namespace {

struct Op {
    int32_t kind, act, rows, block, tile, vectors, k_blocks, chunks;
    const int32_t *starts, *offsets;
    const float *values, *bias, *x;   // values of sums: terms, the weights of a block and where their input lies
    float* y;
    const int32_t* mask;   // of each position: all bits where there is a pixel, none between rows
    const float* residual;
    int64_t y_stride, r_stride, a[16];
};

#if defined(__GNUC__)
#if defined(__clang__)
#define PUSH_512 _Pragma("clang attribute push(__attribute__((target(\"avx512f,avx512vl,avx512dq,avx512bw,fma\"))), apply_to=function)")
#define PUSH_2 _Pragma("clang attribute push(__attribute__((target(\"avx2,fma\"))), apply_to=function)")
#define POP _Pragma("clang attribute pop")
#else
#define PUSH_512 _Pragma("GCC push_options") _Pragma("GCC target(\"avx512f,avx512vl,avx512dq,avx512bw,fma\")")
#define PUSH_2 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma\")")
#define POP _Pragma("GCC pop_options")
#endif

namespace narrow {
#define VL 4
#include "engine.inc"
#undef VL
}
#if defined(__x86_64__)
PUSH_2
namespace avx2 {
#define VL 8
#if !defined(__clang__)
#define EVEN(a, b) __builtin_shuffle(a, b, (ints){0,2,4,6,8,10,12,14})
#define LOW(a, b) __builtin_shuffle(a, b, (ints){0,8,1,9,2,10,3,11})
#define HIGH(a, b) __builtin_shuffle(a, b, (ints){4,12,5,13,6,14,7,15})
#endif
#include "engine.inc"
#undef EVEN
#undef LOW
#undef HIGH
#undef VL
}
POP
PUSH_512
namespace avx512 {
#define VL 16
#if !defined(__clang__)
#define EVEN(a, b) __builtin_shuffle(a, b, (ints){0,2,4,6,8,10,12,14,16,18,20,22,24,26,28,30})
#define LOW(a, b) __builtin_shuffle(a, b, (ints){0,16,1,17,2,18,3,19,4,20,5,21,6,22,7,23})
#define HIGH(a, b) __builtin_shuffle(a, b, (ints){8,24,9,25,10,26,11,27,12,28,13,29,14,30,15,31})
#endif
#include "engine.inc"
#undef EVEN
#undef LOW
#undef HIGH
#undef VL
}
POP
#endif
#endif

struct Set { const char* name; int floats; void (*job)(const Op&, int); int64_t (*n_jobs)(const Op&); int (*finite)(const float*, int64_t); };

std::vector<Set> sets() {
    std::vector<Set> found;
#if defined(__GNUC__)
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw")) found.push_back({"avx512", 16, avx512::job, avx512::n_jobs, avx512::finite});
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back({"avx2", 8, avx2::job, avx2::n_jobs, avx2::finite});
#endif
    found.push_back({"128-bit vectors", 4, narrow::job, narrow::n_jobs, narrow::finite});
#endif
    return found;
}

const std::vector<Set>& all() {
    static const auto found = sets();
    return found;
}

// Threads that go through the operations side by side, and wait for each other after each
struct Crew {
    const Op* ops;
    const int64_t n;
    const Set set;
    const int threads;
    std::vector<std::atomic<int64_t>> next, done;

    Crew(const Op* ops, int64_t n, Set set, int threads) : ops(ops), n(n), set(set), threads(threads), next(n), done(n) {}

    void work() {
        for (int64_t i = 0; i < n; i++) {
            const int64_t jobs = set.n_jobs(ops[i]);
            const int64_t step = ops[i].kind == 0 ? 1 : std::max<int64_t>(1, jobs/(4*threads));
            for (int64_t j; (j = next[i].fetch_add(step)) < jobs; ) for (int64_t k = j; k < std::min(jobs, j+step); k++) set.job(ops[i], (int)k);
            done[i].fetch_add(1);
            for (int spins = 0; done[i].load() < threads; spins++) if (spins > 2000) std::this_thread::yield();
        }
    }
};

}

// Name of the `i`th best instruction set here and how many floats its vectors have, or a null pointer
EXPORT const char* fs_engine_set(int i, int* floats) {
    if (i < 0 || i >= (int)all().size()) return nullptr;
    *floats = all()[i].floats;
    return all()[i].name;
}

EXPORT int fs_op_size() { return (int)sizeof(Op); }

// Whether none of `n` numbers is infinite or no number
EXPORT int fs_finite(const void* x, int64_t n) { return all()[0].finite((const float*)x, n); }

EXPORT void fs_run(const void* ops, int64_t n, int which, int threads) {
    const Op* o = (const Op*)ops;
    const Set set = all()[which];
    if (threads <= 1) {
        for (int64_t i = 0; i < n; i++) for (int64_t j = 0, jobs = set.n_jobs(o[i]); j < jobs; j++) set.job(o[i], (int)j);
        return;
    }
    Crew crew(o, n, set, threads);
    std::vector<std::thread> others;
    for (int t = 1; t < threads; t++) others.emplace_back(&Crew::work, &crew);
    crew.work();
    for (auto& t : others) t.join();
}
