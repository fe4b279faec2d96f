// The kernels, declared for the instruction set that a file is being built for, and the table of each build.
//
// Every file of this folder is compiled once per instruction set, with TENFOLD_ISA naming the namespace. What a
// kernel file calls must be its own: an inline function of the standard library would exist once per instruction
// set under one name, and the linker might keep the copy that this CPU cannot run.
#pragma once

#include <cstdint>

namespace tenfold {

// One line of a table; the last line has no name. `run` is cast back to the kernel's own type by the caller.
struct Kernel {
    const char* name;
    void (*run)();
};

namespace scalar {
extern const Kernel kernels[];
}
#ifdef TENFOLD_BUILT_AVX2
namespace avx2 {
extern const Kernel kernels[];
}
#endif

#ifdef TENFOLD_ISA
namespace TENFOLD_ISA {

// out[r, :] = weight * x[r, :] / sqrt(mean(x[r, :]^2) + eps); rows are dense, out may be x, width >= 1.
void rms_norm(const float* x, const float* weight, float* out, int64_t rows, int64_t width, float eps,
              int32_t threads);

}  // namespace TENFOLD_ISA
#endif

}  // namespace tenfold
