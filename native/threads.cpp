#include "threads.hpp"

#include <atomic>
#include <thread>

namespace tenfold {
namespace {

OpenMp openmp;

using Body = void (*)(void*, int32_t, int32_t);

struct Team {
    Body body;
    void* context;
};

void run_worker(void* opaque) {
    const Team& team = *static_cast<const Team*>(opaque);
    team.body(team.context, openmp.worker(), openmp.workers());
}

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Returns once met() is true. Whoever waits long does so because cores are short, and lets others have this one.
template <class Met>
void wait_until(const Met& met) {
    constexpr int kPauses = 2000;
    for (int i = 0; !met(); ++i) i < kPauses ? pause() : std::this_thread::yield();
}

// The threads of a `together`. One cache line tells the helpers of work, the other tells that it is done.
struct alignas(64) Crew {
    Work run;
    void* context;
    int32_t workers = 1;
    std::atomic<uint32_t> turn{0};
    Team team{nullptr, nullptr};  // without a body: it is over
    alignas(64) std::atomic<int32_t> done{0};
};

thread_local Crew* crew = nullptr;

void help(Crew& with, int32_t worker) {
    for (uint32_t turn = 1;; ++turn) {
        wait_until([&] { return with.turn.load(std::memory_order_acquire) == turn; });
        if (with.team.body == nullptr) return;
        with.team.body(with.team.context, worker, with.workers);
        with.done.fetch_add(1, std::memory_order_release);
    }
}

void hand_out(Crew& to, const Team& team) {
    to.team = team;
    to.done.store(0, std::memory_order_relaxed);
    to.turn.fetch_add(1, std::memory_order_release);
}

void join_crew(void* opaque) {
    Crew& mine = *static_cast<Crew*>(opaque);
    if (const int32_t worker = openmp.worker(); worker != 0) return help(mine, worker);
    mine.workers = openmp.workers();
    crew = &mine;
    mine.run(mine.context);
    crew = nullptr;
    hand_out(mine, {nullptr, nullptr});
}

}  // namespace

void use_openmp(const OpenMp& runtime) { openmp = runtime; }

void parallel(int32_t threads, Body body, void* context) {
    if (threads <= 1 || openmp.parallel == nullptr) {
        body(context, 0, 1);
    } else if (crew == nullptr) {
        Team team{body, context};
        openmp.parallel(run_worker, &team, static_cast<unsigned>(threads), 0);
    } else {
        Crew& mine = *crew;
        hand_out(mine, {body, context});
        body(context, 0, mine.workers);
        wait_until([&] { return mine.done.load(std::memory_order_acquire) == mine.workers - 1; });
    }
}

void together(int32_t threads, Work run, void* context) {
    if (threads <= 1 || openmp.parallel == nullptr || crew != nullptr) return run(context);
    Crew mine{run, context};
    openmp.parallel(join_crew, &mine, static_cast<unsigned>(threads), 0);
}

}  // namespace tenfold
