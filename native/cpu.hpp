// What this CPU and its operating system can run. Knows nothing of kernels.
#pragma once

namespace tenfold {

// The instruction-set extensions that kernels may be built for, as found at run time.
struct CpuFeatures {
    bool sse2 = false;
    bool avx2 = false;
    bool fma = false;
    bool f16c = false;
    bool avx512f = false;
    bool avx512bw = false;
    bool avx512dq = false;
    bool avx512vl = false;
    bool avx512_vnni = false;
    bool avx512vbmi = false;
    bool avx512_bf16 = false;
    bool amx_tile = false;
    bool amx_int8 = false;
    bool amx_bf16 = false;
};

// Probes once; an extension counts only if the operating system saves its registers.
const CpuFeatures& cpu_features();

// The same as words, "sse2 avx2 fma f16c"; empty where nothing is known.
const char* cpu_feature_names();

}  // namespace tenfold
