// For all exported functions: their linkage, and the return codes that report a failure.
#pragma once
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C"
#endif

namespace {

// Return codes of the exported functions; `check_outcome` in nbs/utils/06_native makes Python errors of them
enum Outcome { DONE = 0, NO_MEMORY = 1, NO_INSTRUCTION_SET = 2, FAILED = 3 };

// Calls `f` and returns the code of its outcome. An exception must not leave an exported function or a thread: Python
// could not catch it, and the process would be aborted
template<class F> int outcome_of(F&& f) noexcept {
    try {
        f();
        return DONE;
    }
    catch (const std::bad_alloc&) { return NO_MEMORY; }
    catch (const std::length_error&) { return NO_MEMORY; }   // a std::vector of more than it can ever hold
    catch (...) { return FAILED; }
}

// Runs `f` on a new thread, which is added to `threads` (room is reserved by the caller). False where the system
// refuses the thread: a container's limit on threads, `ulimit -u`, no memory for the stack
template<class F> bool started(std::vector<std::thread>& threads, F&& f) noexcept {
    try {
        threads.emplace_back(f);
        return true;
    }
    catch (...) { return false; }
}

}
