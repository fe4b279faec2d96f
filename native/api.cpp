// The C interface, a table of contents: which builds exist, which may run here, where each kernel starts.
// Arguments were checked by the caller (src/tenfold/_native.py); nothing here knows of Python or torch.
#include <cstdint>
#include <cstring>

#include "cpu.hpp"
#include "kernels/kernels.hpp"
#include "threads.hpp"

namespace tenfold {
namespace {

struct Build {
    const char* isa;
    const Kernel* kernels;
    bool (*runs_here)();
};

#ifdef TENFOLD_BUILT_AVX512
bool runs_avx512() {
    const CpuFeatures& cpu = cpu_features();
    return cpu.avx2 && cpu.fma && cpu.f16c && cpu.avx512f && cpu.avx512bw && cpu.avx512dq && cpu.avx512vl &&
           cpu.avx512_vnni;
}
#endif

#ifdef TENFOLD_BUILT_AMX
bool runs_amx() {
    const CpuFeatures& cpu = cpu_features();
    return runs_avx512() && cpu.avx512vbmi && cpu.avx512_bf16 && cpu.amx_tile && cpu.amx_int8 && cpu.amx_bf16;
}
#endif

// Best first.
const Build builds[] = {
#ifdef TENFOLD_BUILT_AMX
    {"amx", amx::kernels, runs_amx},
#endif
#ifdef TENFOLD_BUILT_AVX512
    {"avx512", avx512::kernels, runs_avx512},
#endif
#ifdef TENFOLD_BUILT_AVX2
    {"avx2", avx2::kernels,
     [] { return cpu_features().avx2 && cpu_features().fma && cpu_features().f16c; }},
#endif
    {"scalar", scalar::kernels, [] { return true; }},
};

constexpr int32_t num_builds = sizeof(builds) / sizeof(builds[0]);

struct Program {
    const uint64_t* at;
    int64_t calls;
};

void run_program(void* opaque) {
    const Program& program = *static_cast<const Program*>(opaque);
    const uint64_t* at = program.at;
    for (int64_t i = 0; i < program.calls; ++i) {
        const Kernel* line = nullptr;
        std::memcpy(&line, at, sizeof(line));
        line->replay(at + 2);
        at += 2 + at[1];
    }
}

}  // namespace
}  // namespace tenfold

#define TENFOLD_EXPORT extern "C" __attribute__((visibility("default")))

// Changes whenever a function below or the arguments of a kernel change.
TENFOLD_EXPORT int32_t tenfold_abi_version() { return 7; }

// "sse2 avx2 fma f16c": what this CPU and its operating system offer.
TENFOLD_EXPORT const char* tenfold_cpu_features() { return tenfold::cpu_feature_names(); }

// The instruction set of the index-th build, best first; null past the last.
TENFOLD_EXPORT const char* tenfold_isa(int32_t index) {
    return index >= 0 && index < tenfold::num_builds ? tenfold::builds[index].isa : nullptr;
}

// The kernels of one instruction set; null if it was not built or does not run on this CPU.
TENFOLD_EXPORT const tenfold::Kernel* tenfold_select(const char* isa) {
    for (const tenfold::Build& build : tenfold::builds) {
        if (std::strcmp(build.isa, isa) == 0) return build.runs_here() ? build.kernels : nullptr;
    }
    return nullptr;
}

// The line of a selected build's table; null if there is none of that name.
TENFOLD_EXPORT const tenfold::Kernel* tenfold_line(const tenfold::Kernel* kernels, const char* name) {
    for (; kernels->name != nullptr; ++kernels) {
        if (std::strcmp(kernels->name, name) == 0) return kernels;
    }
    return nullptr;
}

// Where the kernel of a line starts.
TENFOLD_EXPORT void* tenfold_kernel(const tenfold::Kernel* line) { return reinterpret_cast<void*>(line->run); }

// Runs calls that were recorded: a line, the number of its arguments and these, a slot each, one after the other.
TENFOLD_EXPORT void tenfold_replay(const uint64_t* program, int64_t calls, int32_t threads) {
    tenfold::Program all{program, calls};
    tenfold::together(threads, tenfold::run_program, &all);
}

// GOMP_parallel, omp_get_thread_num and omp_get_num_threads of the runtime that torch uses.
TENFOLD_EXPORT void tenfold_use_openmp(void* parallel, void* worker, void* workers) {
    tenfold::OpenMp runtime;
    runtime.parallel = reinterpret_cast<decltype(runtime.parallel)>(parallel);
    runtime.worker = reinterpret_cast<decltype(runtime.worker)>(worker);
    runtime.workers = reinterpret_cast<decltype(runtime.workers)>(workers);
    tenfold::use_openmp(runtime);
}
