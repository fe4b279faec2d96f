#include "kernels.hpp"

namespace tenfold::TENFOLD_ISA {

extern const Kernel kernels[] = {
    {"rms_norm", reinterpret_cast<void (*)()>(rms_norm)},
    {nullptr, nullptr},
};

}  // namespace tenfold::TENFOLD_ISA
