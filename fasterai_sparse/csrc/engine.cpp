// The engine: runs a list of operations and skips the weights that are zero. Activations lie in memory as
// nbs/engine/00_ops describes. The interface is plain C, which Python loads with ctypes. The list is made by the
// classes in nbs/engine/00_ops; the method `run_torch` of each class specifies its operation.
//
//   ops.def, acts.def   the lists of operations and activations
//   ops.h               the structures of arguments, made from them
//   vec.inc             vectors and activations
//   conv.inc, matvec.inc, dense.inc, attention.inc   the kernels
//   engine.inc          all of these files compiled for one instruction set
//   engine.cpp          instruction sets, threads, and the exported functions
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
#include "ops.h"

namespace {

#if defined(__GNUC__)
#if defined(__clang__)
#define PUSH_512 \
_Pragma("clang attribute push(__attribute__((target(\"avx512f,avx512vl,avx512dq,avx512bw,fma\"))), apply_to=function)")
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

// An instruction set, the number of floats in its vectors, and its kernels
struct Set {
    const char* name;
    int floats;
    void (*job)(const Op&, int64_t);
    int64_t (*n_jobs)(const Op&);
    int (*finite)(const float*, int64_t);
};

// The instruction sets that were compiled and that this processor has, the best first
struct Sets {
    Set found[3];
    int n = 0;

    Sets() {
#if defined(__GNUC__)
#if defined(__x86_64__)
        __builtin_cpu_init();
        const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl")
                          && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
        if (wide) found[n++] = {"avx512", 16, avx512::job, avx512::n_jobs, avx512::finite};
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
            found[n++] = {"avx2", 8, avx2::job, avx2::n_jobs, avx2::finite};
        }
#endif
        found[n++] = {"128-bit vectors", 4, narrow::job, narrow::n_jobs, narrow::finite};
#endif
    }
};

// The `i`th best set, or a null pointer
const Set* set_number(int i) {
    static const Sets sets;
    return i >= 0 && i < sets.n ? &sets.found[i] : nullptr;
}

// Threads that run a list of operations together. All take jobs of one operation, and wait until it is done before they
// go on to the next
struct Crew {
    const Op* ops;
    const int64_t n;
    const Set& set;
    const int threads;
    // For each operation: number of the first job that no thread has taken; number of threads that found no job left
    std::vector<std::atomic<int64_t>> next, done;
    std::atomic<int> members;   // threads that take part; fewer than `threads` where the system refuses some
    std::atomic<int> code{DONE};
    std::atomic<int64_t> failed{-1};   // number of the operation that failed

    Crew(const Op* ops, int64_t n, const Set& set, int threads)
        : ops(ops), n(n), set(set), threads(threads), next(n), done(n), members(threads) {}

    void run_jobs(int64_t i) {
        const int64_t jobs = set.n_jobs(ops[i]);
        const int64_t step = ops[i].kind == OP_conv ? 1 : std::max<int64_t>(1, jobs/(4*threads));
        for (int64_t j; (j = next[i].fetch_add(step)) < jobs; ) {
            for (int64_t k = j; k < std::min(jobs, j+step); k++) set.job(ops[i], k);
        }
    }

    void work() noexcept {
        for (int64_t i = 0; i < n && !code.load(); i++) {
            if (const int outcome = outcome_of([&] { run_jobs(i); })) {   // other threads read `code` and stop
                failed.store(i);
                code.store(outcome);
            }
            done[i].fetch_add(1);
            for (int spins = 0; done[i].load() < members.load() && !code.load(); spins++) {
                if (spins > 2000) std::this_thread::yield();
            }
        }
    }
};

int run_alone(const Op* ops, int64_t n, const Set& set, int64_t* failed) noexcept {
    int64_t i = 0;
    const int outcome = outcome_of([&] {
        for (; i < n; i++) for (int64_t j = 0, jobs = set.n_jobs(ops[i]); j < jobs; j++) set.job(ops[i], j);
    });
    if (outcome) *failed = i;
    return outcome;
}

// May throw std::bad_alloc, but only before it starts a thread
int run_together(const Op* ops, int64_t n, const Set& set, int threads, int64_t* failed) {
    Crew crew(ops, n, set, threads);
    std::vector<std::thread> others;
    others.reserve(threads-1);
    while ((int)others.size() < threads-1 && started(others, [&crew] { crew.work(); })) {}
    crew.members.store(1 + (int)others.size());
    crew.work();
    for (auto& t : others) t.join();
    *failed = crew.failed.load();
    return crew.code.load();
}

}

// The operations with their arguments, and the activations, that this library was compiled with
EXPORT const char* fs_operations() noexcept { return operation_list; }
EXPORT const char* fs_activations() noexcept { return activation_list; }

// Name of the `i`th best instruction set here and how many floats its vectors have, or a null pointer
EXPORT const char* fs_engine_set(int i, int* floats) noexcept {
    const Set* set = set_number(i);
    if (!set) return nullptr;
    *floats = set->floats;
    return set->name;
}

// 1 if none of `n` floats is NaN or infinite, 0 if one is, -1 where there is no instruction set
EXPORT int fs_finite(const void* x, int64_t n) noexcept {
    const Set* set = set_number(0);
    return set ? set->finite((const float*)x, n) : -1;
}

// Runs `n` operations in the `which`th best instruction set on at most `threads` threads. Returns an Outcome; `failed`
// becomes the number of the operation that failed, or -1. After a failed run the contents of its outputs are undefined.
EXPORT int fs_run(const void* ops, int64_t n, int which, int threads, int64_t* failed) noexcept {
    const Set* set = set_number(which);
    *failed = -1;
    if (!set) return NO_INSTRUCTION_SET;
    if (threads <= 1) return run_alone((const Op*)ops, n, *set, failed);
    int code = DONE;
    const int outcome = outcome_of([&] { code = run_together((const Op*)ops, n, *set, threads, failed); });
    return outcome ? outcome : code;
}
