#include "kernels.hpp"

namespace tenfold::TENFOLD_ISA {
namespace {

template <int... I>
struct Places {};
template <int N, int... I>
struct UpTo : UpTo<N - 1, N - 1, I...> {};
template <int... I>
struct UpTo<0, I...> {
    using Type = Places<I...>;
};

// An argument as it lies in a slot: its own bytes, then nothing.
template <class T>
T taken(const uint64_t* slot) {
    T value;
    __builtin_memcpy(&value, slot, sizeof(T));
    return value;
}

template <auto kernel>
struct Line;
template <class... Arguments, void (*kernel)(Arguments...)>
struct Line<kernel> {
    template <int... I>
    static void call(const uint64_t* slots, Places<I...>) {
        kernel(taken<Arguments>(slots + I)...);
    }
    static void replay(const uint64_t* slots) { call(slots, typename UpTo<sizeof...(Arguments)>::Type()); }
};

template <auto kernel>
Kernel line(const char* name) {
    return {name, reinterpret_cast<void (*)()>(kernel), Line<kernel>::replay};
}

}  // namespace

extern const Kernel kernels[] = {
    line<rms_norm>("rms_norm"),
    line<linear>("linear"),
    line<linear_each>("linear_each"),
    line<experts>("experts"),
    line<sparse_attention>("sparse_attention"),
    line<select_rows>("select_rows"),
    line<pack_rows>("pack_rows"),
    line<unpack_rows>("unpack_rows"),
    line<hc_mix>("hc_mix"),
    line<hc_collapse>("hc_collapse"),
    line<hc_merge>("hc_merge"),
    line<turn_rows>("turn_rows"),
    line<rope>("rope"),
    line<hadamard>("hadamard"),
    line<compress>("compress"),
    line<embed>("embed"),
    line<look_up>("look_up"),
    line<route>("route"),
    line<store_rows>("store_rows"),
    line<compress_step>("compress_step"),
    line<select_sessions>("select_sessions"),
    line<attend_sessions>("attend_sessions"),
    line<peak_read>("peak_read"),
    line<peak_float32>("peak_float32"),
    line<peak_int8>("peak_int8"),
    line<peak_int16>("peak_int16"),
    {nullptr, nullptr, nullptr},
};

}  // namespace tenfold::TENFOLD_ISA
