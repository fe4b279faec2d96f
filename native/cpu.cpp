#include "cpu.hpp"

#include <cstdint>
#include <string>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#define TENFOLD_X86 1
#endif

namespace tenfold {
namespace {

#ifdef TENFOLD_X86

struct Registers {
    uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(uint32_t leaf, uint32_t part = 0) {
    Registers r;
    __get_cpuid_count(leaf, part, &r.eax, &r.ebx, &r.ecx, &r.edx);
    return r;
}

// XCR0: which register files the operating system saves on a context switch.
uint64_t saved_register_files() {
    uint32_t low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<uint64_t>(high) << 32) | low;
}

// Linux saves the 8 KB of tiles for processes that ask for it, once and for all of their threads.
bool may_use_tiles() {
#ifdef __linux__
    constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM of asm/prctl.h
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}

bool has(uint32_t word, int bit) { return ((word >> bit) & 1U) != 0; }

CpuFeatures probe() {
    constexpr uint64_t ymm_state = 0x06, zmm_state = 0xe6, tile_state = 0x60000;
    const Registers basic = cpuid(1);
    const Registers extended = cpuid(7);
    const uint64_t saved = has(basic.ecx, 27) ? saved_register_files() : 0;  // bit 27: xgetbv may be used
    const bool ymm = (saved & ymm_state) == ymm_state;
    const bool zmm = (saved & zmm_state) == zmm_state;

    CpuFeatures found;
    found.sse2 = has(basic.edx, 26);
    found.fma = ymm && has(basic.ecx, 12);
    found.f16c = ymm && has(basic.ecx, 29);
    found.avx2 = ymm && has(extended.ebx, 5);
    found.avx512f = zmm && has(extended.ebx, 16);
    found.avx512bw = zmm && has(extended.ebx, 30);
    found.avx512dq = zmm && has(extended.ebx, 17);
    found.avx512vl = zmm && has(extended.ebx, 31);
    found.avx512_vnni = zmm && has(extended.ecx, 11);
    found.avx512vbmi = zmm && has(extended.ecx, 1);
    found.avx512_bf16 = zmm && has(cpuid(7, 1).eax, 5);
    const bool tiles = (saved & tile_state) == tile_state && has(extended.edx, 24) && may_use_tiles();
    found.amx_tile = tiles;
    found.amx_int8 = tiles && has(extended.edx, 25);
    found.amx_bf16 = tiles && has(extended.edx, 22);
    return found;
}

#else

CpuFeatures probe() { return {}; }

#endif

std::string join(const CpuFeatures& found) {
    std::string names;
    const auto add = [&names](bool present, const char* name) {
        if (!present) return;
        if (!names.empty()) names += ' ';
        names += name;
    };
    add(found.sse2, "sse2");
    add(found.avx2, "avx2");
    add(found.fma, "fma");
    add(found.f16c, "f16c");
    add(found.avx512f, "avx512f");
    add(found.avx512bw, "avx512bw");
    add(found.avx512dq, "avx512dq");
    add(found.avx512vl, "avx512vl");
    add(found.avx512_vnni, "avx512_vnni");
    add(found.avx512vbmi, "avx512vbmi");
    add(found.avx512_bf16, "avx512_bf16");
    add(found.amx_tile, "amx_tile");
    add(found.amx_int8, "amx_int8");
    add(found.amx_bf16, "amx_bf16");
    return names;
}

}  // namespace

const CpuFeatures& cpu_features() {
    static const CpuFeatures found = probe();
    return found;
}

const char* cpu_feature_names() {
    static const std::string names = join(cpu_features());
    return names.c_str();
}

}  // namespace tenfold
