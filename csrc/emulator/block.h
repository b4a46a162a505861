// The block of threads that runs, and what takes turns in it: for runtime.cpp, which schedules and launches, and
// instructions.cpp, which does what kernels call.
#pragma once

#include <array>
#include <cstring>
#include <deque>
#include <mutex>
#include <string>
#include <vector>

#include "counters.h"
#include "fiber.h"
#include "races.h"
#include "runtime.h"

namespace gptkern::emulator::running {

inline constexpr unsigned WARP = 32, MOST_THREADS = 1024, MOST_WARPS = MOST_THREADS / WARP;
inline constexpr unsigned ALL = 0xffffffffu;
inline constexpr unsigned char POISON = 0xff;  // a NaN in every floating-point type, -1 as an integer

class Random {
   public:
    explicit Random(uint64_t seed = 0) : state_(seed * 0x9e3779b97f4a7c15u + 0x2545f4914f6cdd1du) {}
    uint32_t operator()() {  // xorshift64* (Marsaglia 2003, Vigna 2016)
        state_ ^= state_ >> 12;
        state_ ^= state_ << 25;
        state_ ^= state_ >> 27;
        return uint32_t(state_ * 0x2545f4914f6cdd1du >> 32);
    }
    uint32_t below(uint32_t bound) { return uint32_t(uint64_t((*this)()) * bound >> 32); }

   private:
    uint64_t state_;
};

struct Copy {
    void* shared;
    const void* global;  // null: zeros land
    int bytes;
    int group;
    int countdown;  // lands when the thread has waited so often; negative: in cp_async_wait
    bool landed;
};

struct Thread {
    Fiber fiber;
    Index index;
    unsigned lane = 0, warp = 0;
    bool done = false;
    const char* waits_for = nullptr;  // what it stands at, for the report of a deadlock
    Site site{};
    std::vector<Copy> copies;  // which no wait has covered
    int group = 0;
    uint32_t epoch = 0;
};

// A warp's lanes on their way to one collective.
struct Meeting {
    const char* kind;
    Site site;
    unsigned arrived = 0;
    std::array<void*, WARP> arguments{};
};

struct Warp {
    unsigned ready = 0;
    uint32_t priority = 0;
    uint32_t barriers = 0;
    std::vector<Meeting> meetings;
};

// --- State ------------------------------------------------------------------------------------------------------------

// Held by a launch, and by whatever sets what launches read: there is one block, with its fibers, and Python's lock is
// not held while it runs (csrc/binding.h).
extern std::mutex launching;

extern bool checking_races;
extern std::vector<std::pair<uintptr_t, uintptr_t>> bounds;  // of global memory; none: any may be touched

extern std::deque<Thread> threads;
extern std::array<Warp, MOST_WARPS> warps;
extern std::vector<LogEntry> logs[MOST_THREADS];
extern KernelCounts* counts;  // null: nobody counts

extern Thread* current;
extern unsigned thread_count, warp_count, at_barrier;
extern Site barrier_site;
extern Index the_block, the_block_size, the_grid;
extern Random random_numbers;
extern bool in_order;
extern uint32_t accesses_to_switch;  // a thread goes on so many accesses before another may run; 0: it waits for nothing

extern SharedRaces shared_races;
extern GlobalRaces global_races;
extern uint32_t barriers;  // of blocks, ever
extern unsigned block_number;

extern unsigned char* shared;
extern size_t shared_bytes_launched;

// --- Taking turns -----------------------------------------------------------------------------------------------------

void make_ready(unsigned warp, unsigned lanes);
// Leaves the running fiber for the next that can run, or for the host where none can.
void go_on(bool for_good);
// Does so until somebody makes the running thread ready; copies may land meanwhile.
void wait_at(const char* what, const Site& site);
// The running lane and the 31 others of its warp meet here; the last to come executes for all.
void meet(const char* kind, const Site& site, void* argument, void (*execute)(void**));
void land(Copy& copy);

[[noreturn]] void fail(const std::string& what);
bool same_place(const Site& a, const Site& b);
std::string place(const Site& site);

}  // namespace gptkern::emulator::running
