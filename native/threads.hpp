// Work shared between threads, on the OpenMP pool that torch already owns. Knows nothing of kernels.
//
// The library links no OpenMP runtime: a second pool beside torch's would fight it for the same cores.
// Whoever loads the library hands over three entry points of the runtime that torch uses; libgomp, LLVM's
// and Intel's runtimes all have them. Without them everything runs on the calling thread.
#pragma once

#include <cstdint>

namespace tenfold {

using Work = void (*)(void* context);

struct OpenMp {
    void (*parallel)(Work work, void* context, unsigned threads, unsigned flags) = nullptr;  // GOMP_parallel
    int (*worker)() = nullptr;                                                               // omp_get_thread_num
    int (*workers)() = nullptr;                                                              // omp_get_num_threads
};

// Set once, before the first kernel runs.
void use_openmp(const OpenMp& runtime);

// Runs body(context, worker, workers) on `threads` threads at once, or within `together` on those that stand by, and
// returns when all are done.
void parallel(int32_t threads, void (*body)(void* context, int32_t worker, int32_t workers), void* context);

// Calls run(context) on this thread while `threads` - 1 others stand by: each `parallel` in it then costs a cache line
// there and one back, where to fork and join takes some microseconds.
void together(int32_t threads, Work run, void* context);

// One worker's part of a work: an equal share of any number of things, from first_of to before last_of.
struct Share {
    int32_t worker, workers;
};
static inline int64_t first_of(const Share& share, int64_t count) { return count * share.worker / share.workers; }
static inline int64_t last_of(const Share& share, int64_t count) { return count * (share.worker + 1) / share.workers; }

// Calls run(share) for each share. `elements` is the size of the whole work: below some 16 thousand a fork costs
// more than it saves. It is all threads or one, since a pool that changes its size ends and starts threads. Static:
// a template shared between instruction sets would be merged by the linker.
template <class Run>
static void split_work(int64_t elements, int32_t threads, const Run& run) {
    struct Context {
        const Run& run;
    } context{run};
    const auto share = [](void* opaque, int32_t worker, int32_t workers) {
        static_cast<const Context*>(opaque)->run(Share{worker, workers});
    };
    parallel(elements < 16384 ? 1 : threads, share, &context);
}

// Calls run(first, last) on equal shares of [0, rows).
template <class Run>
static void split_rows(int64_t rows, int64_t elements, int32_t threads, const Run& run) {
    split_work(elements, threads, [rows, &run](const Share& share) { run(first_of(share, rows), last_of(share, rows)); });
}

}  // namespace tenfold
