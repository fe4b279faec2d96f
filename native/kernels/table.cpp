#include "kernels.hpp"

namespace tenfold::TENFOLD_ISA {

extern const Kernel kernels[] = {
    {"rms_norm", reinterpret_cast<void (*)()>(rms_norm)},
    {"linear", reinterpret_cast<void (*)()>(linear)},
    {"linear_each", reinterpret_cast<void (*)()>(linear_each)},
    {"experts", reinterpret_cast<void (*)()>(experts)},
    {"sparse_attention", reinterpret_cast<void (*)()>(sparse_attention)},
    {"select_rows", reinterpret_cast<void (*)()>(select_rows)},
    {"pack_rows", reinterpret_cast<void (*)()>(pack_rows)},
    {"unpack_rows", reinterpret_cast<void (*)()>(unpack_rows)},
    {"hc_mix", reinterpret_cast<void (*)()>(hc_mix)},
    {"hc_collapse", reinterpret_cast<void (*)()>(hc_collapse)},
    {"hc_merge", reinterpret_cast<void (*)()>(hc_merge)},
    {"turn_rows", reinterpret_cast<void (*)()>(turn_rows)},
    {"rope", reinterpret_cast<void (*)()>(rope)},
    {"hadamard", reinterpret_cast<void (*)()>(hadamard)},
    {"compress", reinterpret_cast<void (*)()>(compress)},
    {"route", reinterpret_cast<void (*)()>(route)},
    {"peak_read", reinterpret_cast<void (*)()>(peak_read)},
    {"peak_float32", reinterpret_cast<void (*)()>(peak_float32)},
    {"peak_int8", reinterpret_cast<void (*)()>(peak_int8)},
    {nullptr, nullptr},
};

}  // namespace tenfold::TENFOLD_ISA
