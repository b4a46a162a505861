// The emulator's schedule: fibers, whose turn it is, where they meet, and launches.
#include "runtime.h"

#include <pthread.h>

#include <algorithm>
#include <bit>
#include <map>
#include <numeric>
#include <stdexcept>

#include "block.h"

#ifdef GPTKERN_OWN_SWITCH
// Saves the registers that a call must preserve on the stack it leaves, and takes them from the one it enters.
asm(R"(
.text
.p2align 4
.hidden gptkern_switch_stacks
.globl gptkern_switch_stacks
.type gptkern_switch_stacks, @function
gptkern_switch_stacks:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size gptkern_switch_stacks, .-gptkern_switch_stacks
)");
#endif

namespace gptkern::emulator {
namespace running {

std::mutex launching;
uint64_t the_seed = 0, last_blocks = 0;
bool skipping = false, checking_races = true;
std::vector<std::pair<uintptr_t, uintptr_t>> bounds;

Fiber host;
std::deque<Thread> threads;  // grows, and keeps its stacks
std::array<Warp, MOST_WARPS> warps;
std::vector<LogEntry> logs[MOST_THREADS];
KernelCounts* counts = nullptr;

Thread* current = nullptr;
unsigned thread_count = 0, warp_count = 0, ready_warps = 0, done_count = 0, at_barrier = 0;
Site barrier_site;
Index the_block, the_block_size, the_grid;
Random random_numbers;
bool in_order = true, by_priority = false;
uint32_t accesses_to_switch = 0;

SharedRaces shared_races;
GlobalRaces global_races;
uint32_t barriers = 0;
unsigned block_number = 0;

unsigned char* shared = nullptr;
size_t shared_bytes_launched = 0;

void (*kernel_body)(void*) = nullptr;
void* kernel_context = nullptr;
std::string failure;

bool same_place(const Site& a, const Site& b) {
    // The same literal is most often the same pointer.
    return a.line() == b.line() && a.column() == b.column() &&
           (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

std::string place(const Site& site) {
    std::string file = site.file_name();
    return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(site.line());
}

std::string text(const Index& index) {
    return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

void make_ready(unsigned warp, unsigned lanes) {
    warps[warp].ready |= lanes;
    ready_warps |= 1u << warp;
}

// The next thread that can go on; null where there is none.
Thread* take_next() {
    if (ready_warps == 0) return nullptr;
    unsigned warp;
    if (in_order) {
        warp = unsigned(std::countr_zero(ready_warps));
    } else if (by_priority) {
        // Warps run ahead of one another as far as barriers let them: that is how a missing one shows.
        // (the idea of Burckhardt et al., "A Randomized Scheduler with Probabilistic Guarantees of Finding Bugs", 2010)
        warp = unsigned(std::countr_zero(ready_warps));
        for (unsigned rest = ready_warps; rest; rest &= rest - 1) {
            unsigned other = unsigned(std::countr_zero(rest));
            if (warps[other].priority > warps[warp].priority) warp = other;
        }
        constexpr uint32_t SWITCHES_BETWEEN_CHANGES = 512;
        if (random_numbers.below(SWITCHES_BETWEEN_CHANGES) == 0) warps[warp].priority = random_numbers();
    } else {
        unsigned skip = random_numbers.below(unsigned(std::popcount(ready_warps)));
        unsigned rest = ready_warps;
        while (skip--) rest &= rest - 1;
        warp = unsigned(std::countr_zero(rest));
    }
    unsigned ready = warps[warp].ready, lane;
    if (in_order) {
        lane = unsigned(std::countr_zero(ready));
    } else {
        unsigned turn = random_numbers() % WARP;
        lane = (unsigned(std::countr_zero(std::rotr(ready, int(turn)))) + turn) % WARP;
    }
    warps[warp].ready &= ~(1u << lane);
    if (warps[warp].ready == 0) ready_warps &= ~(1u << warp);
    return &threads[warp * WARP + lane];
}

void fail(const std::string& what) { throw std::runtime_error(what); }

std::string deadlock() {
    // what -> threads
    std::map<std::string, std::vector<unsigned>> groups;
    for (unsigned i = 0; i < thread_count; ++i) {
        const Thread& thread = threads[i];
        groups[thread.done ? "have finished" : "wait for " + std::string(thread.waits_for) + " at " + place(thread.site)]
            .push_back(i);
    }
    std::string report = "deadlock:";
    for (const auto& [what, members] : groups)
        report += " " + std::to_string(members.size()) + " threads (" + std::to_string(members.front()) + " … " +
                  std::to_string(members.back()) + ") " + what + ";";
    report.pop_back();
    return report;
}

void go_on(bool for_good) {
    Thread& self = *current;
    Thread* next = failure.empty() ? take_next() : nullptr;
    if (next == &self) return;
    if (!next && failure.empty() && done_count != thread_count) failure = deadlock();
    current = next;
    self.fiber.switch_to(next ? next->fiber : host, for_good);
}

void land(Copy& copy) {
    copy.landed = true;
    if (copy.global)
        std::memcpy(copy.shared, copy.global, size_t(copy.bytes));
    else
        std::memset(copy.shared, 0, size_t(copy.bytes));
}

void wait_at(const char* what, const Site& site) {
    Thread& self = *current;
    self.waits_for = what;
    self.site = site;
    for (Copy& copy : self.copies)
        if (!copy.landed && copy.countdown > 0 && --copy.countdown == 0) land(copy);
    go_on(false);
}

void meet(const char* kind, const Site& site, void* argument, void (*execute)(void**)) {
    Thread& self = *current;
    Warp& warp = warps[self.warp];
    auto meeting = std::find_if(warp.meetings.begin(), warp.meetings.end(), [&](const Meeting& open) {
        return !(open.arrived >> self.lane & 1) && (open.kind == kind || std::strcmp(open.kind, kind) == 0) &&
               same_place(open.site, site);
    });
    if (meeting == warp.meetings.end()) {
        warp.meetings.push_back({kind, site});
        meeting = warp.meetings.end() - 1;
    }
    meeting->arguments[self.lane] = argument;
    meeting->arrived |= 1u << self.lane;
    ++self.epoch;
    if (meeting->arrived != ALL) return wait_at(kind, site);
    if (execute) execute(meeting->arguments.data());
    warp.meetings.erase(meeting);
    make_ready(self.warp, ALL & ~(1u << self.lane));
}

void thread_entry() {
    Fiber::arrived(current->fiber);
    try {
        kernel_body(kernel_context);
        if (!current->copies.empty())
            fail("the thread ends while asynchronous copies are under way: a cp_async_wait is missing");
    } catch (const std::exception& error) {
        failure = std::string(error.what()) + " (thread " + text(current->index) + ")";
    } catch (...) {
        failure = "the kernel threw what is no std::exception (thread " + text(current->index) + ")";
    }
    current->done = true;
    ++done_count;
    go_on(true);
    __builtin_unreachable();
}

void run_block() {
    if (shared_bytes_launched) {
        // Of exactly the size asked for, so that AddressSanitizer sees an access beyond it.
        std::memset(shared, POISON, shared_bytes_launched);
    }
    done_count = at_barrier = ready_warps = 0;
    ++barriers;
    for (unsigned warp = 0; warp < warp_count; ++warp) {
        warps[warp].meetings.clear();
        warps[warp].ready = 0;
        warps[warp].priority = random_numbers();
        make_ready(warp, ALL);
    }
    for (unsigned i = 0; i < thread_count; ++i) {
        Thread& thread = threads[i];
        thread.index = {i, 0, 0};
        thread.lane = i % WARP;
        thread.warp = i / WARP;
        thread.done = false;
        thread.waits_for = "its start";
        thread.copies.clear();
        thread.group = 0;
        thread.epoch = 0;
        thread.fiber.prepare(thread_entry);
    }
    current = take_next();
    host.switch_to(current->fiber);
    current = nullptr;
    if (counts) {
        ++counts->blocks;
        for (unsigned warp = 0; warp < warp_count; ++warp) count_warp(*counts, &logs[warp * WARP]);
    }
}

}  // namespace running

using namespace running;

// --- Launching --------------------------------------------------------------------------------------------------------

void set_seed(uint64_t seed) {
    std::lock_guard lock(launching);
    the_seed = seed;
}
uint64_t seed() {
    std::lock_guard lock(launching);
    return the_seed;
}
void skip_launches(bool skip) {
    std::lock_guard lock(launching);
    skipping = skip;
}
void run_last_blocks(uint64_t count) {
    std::lock_guard lock(launching);
    last_blocks = count;
}
void check_races(bool check) {
    std::lock_guard lock(launching);
    checking_races = check;
}
void set_bounds(std::vector<std::pair<uintptr_t, uintptr_t>> extents) {
    std::lock_guard lock(launching);
    bounds = std::move(extents);
}

void launch(const char* kernel, Index grid, unsigned block_threads, size_t bytes, void (*body)(void*), void* context) {
    auto shape = [&] {
        return std::string(kernel) + ", grid " + text(grid) + ", " + std::to_string(block_threads) + " threads, " +
               std::to_string(bytes) + " bytes of shared memory";
    };
    constexpr size_t MOST_SHARED = 227 * 1024;
    // The rest of a GPU's limits: device/launch.cuh.
    if (block_threads % WARP || bytes > MOST_SHARED)
        throw std::runtime_error("gptkern: a launch failed: invalid configuration (" + shape() +
                                 "); the emulator takes whole warps, and at most " + std::to_string(MOST_SHARED) +
                                 " bytes");
    std::lock_guard lock(launching);
    if (skipping) return;
    while (threads.size() < block_threads) threads.emplace_back();
#ifdef GPTKERN_ADDRESS_SANITIZER
    pthread_attr_t attributes;
    void* stack = nullptr;
    size_t stack_bytes = 0;
    if (pthread_getattr_np(pthread_self(), &attributes) == 0) {
        pthread_attr_getstack(&attributes, &stack, &stack_bytes);
        pthread_attr_destroy(&attributes);
    }
    host.set_stack(stack, stack_bytes);
#endif
    constexpr size_t SHARED_ALIGNMENT = 128;
    shared_bytes_launched = bytes;
    void* storage = nullptr;
    if (bytes && posix_memalign(&storage, SHARED_ALIGNMENT, bytes)) throw std::bad_alloc();
    shared = static_cast<unsigned char*>(storage);
    thread_count = block_threads;
    warp_count = block_threads / WARP;
    the_grid = grid;
    the_block_size = {block_threads, 1, 1};
    kernel_body = body;
    kernel_context = context;
    failure.clear();
    random_numbers = Random(the_seed);
    in_order = the_seed == 0;
    by_priority = the_seed % 2 == 0;
    accesses_to_switch = !in_order && the_seed / 2 % 2 ? 1 : 0;
    if (checking_races) {
        shared_races.start_launch(bytes);
        global_races.start_launch();
    }
    // The next launch has another schedule.
    if (!in_order) ++the_seed;
    uint64_t seed_of_launch = in_order ? 0 : the_seed - 1;
    counts = counting ? &counts_of(kernel) : nullptr;
    if (counts) {
        ++counts->launches;
        counts->threads = std::max<uint64_t>(counts->threads, block_threads);
        counts->shared_bytes = std::max<uint64_t>(counts->shared_bytes, bytes);
    }

    const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
    std::vector<uint64_t> order(size_t(last_blocks ? std::min(last_blocks, blocks) : blocks));
    std::iota(order.begin(), order.end(), blocks - order.size());
    if (!in_order)
        for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_numbers.below(uint32_t(i))]);
    for (uint64_t block : order) {
        the_block = {unsigned(block % grid.x), unsigned(block / grid.x % grid.y), unsigned(block / grid.x / grid.y)};
        block_number = unsigned(block);
        run_block();
        if (!failure.empty()) break;
    }
    free(storage);
    shared = nullptr;
    shared_bytes_launched = 0;
    if (!failure.empty()) {
        for (auto& log : logs) log.clear();
        throw std::runtime_error("gptkern: the emulated kernel failed: " + failure + " in block " + text(the_block) +
                                 ", seed " + std::to_string(seed_of_launch) + " (" + shape() + ")");
    }
}

}  // namespace gptkern::emulator
