// Memory of one kernel call, cut into aligned pieces, and work handed out piece by piece to the threads.
//
// All of it belongs to one instruction set: what the linker merges might be a copy that this CPU cannot run.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "../threads.hpp"

namespace tenfold::TENFOLD_ISA {
namespace {

// Floats from one row of a tile to the next: an odd number of cache lines, so that a column of a tile does not
// fall into two of the cache's sets.
inline int64_t padded_stride(int64_t width) { return ((width + 15) / 16 | 1) * 16; }

constexpr int64_t divided(int64_t value, int64_t by) { return (value + by - 1) / by; }  // rounded up
constexpr int64_t round_up(int64_t value, int64_t multiple) { return divided(value, multiple) * multiple; }

// Asks for memory that is read soon, unless it lies behind the `end` of what there is. The hardware foresees lines
// within a page, not the next page.
template <int nearness = 2>
inline void ask_for(const uint8_t* from, int64_t num_bytes, const uint8_t* end) {
    if (end - from < num_bytes) num_bytes = end - from;
    for (int64_t at = 0; at < num_bytes; at += 64) __builtin_prefetch(from + at, 0, nearness);
}

// Aligned to cache lines, and zeroed unless it need not be; gone with the object.
class Scratch {
public:
    explicit Scratch(int64_t bytes, bool zeroed = true) : size_(round_up(bytes < 64 ? 64 : bytes, 64)) {
        memory_ = static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<uint64_t>(size_)));
        if (memory_ == nullptr) std::abort();  // a few MB; as with any small allocation that fails
        if (zeroed) __builtin_memset(memory_, 0, static_cast<uint64_t>(size_));
    }
    ~Scratch() { std::free(memory_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    // The next `count` elements.
    template <class T>
    T* take(int64_t count) {
        T* piece = reinterpret_cast<T*>(memory_ + used_);
        used_ += bytes_of<T>(count);
        if (used_ > size_) std::abort();
        return piece;
    }

    template <class T>
    static int64_t bytes_of(int64_t count) {
        return round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    }

private:
    uint8_t* memory_ = nullptr;
    int64_t size_ = 0;
    int64_t used_ = 0;
};

// Every thread runs work(next), where next() gives the numbers below `tasks`, each to one thread, then -1.
// For kernels whose results do not depend on which thread takes which task.
template <class Work>
void share_tasks(int64_t tasks, int32_t threads, const Work& work) {
    struct Context {
        int64_t tasks;
        int64_t taken;
        const Work& work;
    } context{tasks, 0, work};
    const auto body = [](void* opaque, int32_t, int32_t) {
        Context& c = *static_cast<Context*>(opaque);
        c.work([&c]() -> int64_t {
            const int64_t task = __atomic_fetch_add(&c.taken, 1, __ATOMIC_RELAXED);
            return task < c.tasks ? task : -1;
        });
    };
    parallel(tasks > 1 ? threads : 1, body, &context);
}

}  // namespace
}  // namespace tenfold::TENFOLD_ISA
