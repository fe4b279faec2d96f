#include "threads.hpp"

namespace tenfold {
namespace {

OpenMp openmp;

struct Team {
    void (*body)(void*, int32_t, int32_t);
    void* context;
};

void run_worker(void* opaque) {
    const Team& team = *static_cast<const Team*>(opaque);
    team.body(team.context, openmp.worker(), openmp.workers());
}

}  // namespace

void use_openmp(const OpenMp& runtime) { openmp = runtime; }

void parallel(int32_t threads, void (*body)(void*, int32_t, int32_t), void* context) {
    if (threads <= 1 || openmp.parallel == nullptr) {
        body(context, 0, 1);
        return;
    }
    Team team{body, context};
    openmp.parallel(run_worker, &team, static_cast<unsigned>(threads), 0);
}

}  // namespace tenfold
