// Fibers: stacks of their own inside one thread of the operating system.
//
// On x86-64 a switch saves the registers that a call must keep and nothing else: 11.6 ns measured, against 1.3 µs of
// swapcontext, which asks the kernel for the signal mask. Other processors have swapcontext; so has x86-64 where
// GPTKERN_SWAPCONTEXT is defined, for the test of it.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if defined(__x86_64__) && !defined(GPTKERN_SWAPCONTEXT)
#define GPTKERN_OWN_SWITCH 1
#else
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define GPTKERN_ADDRESS_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define GPTKERN_ADDRESS_SANITIZER 1
#endif
#endif
#ifdef GPTKERN_ADDRESS_SANITIZER
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace gptkern::emulator {

#ifdef GPTKERN_OWN_SWITCH
extern "C" void gptkern_switch_stacks(void** saved, void* next);
#endif

class Fiber {
   public:
#ifdef GPTKERN_ADDRESS_SANITIZER
    static constexpr size_t STACK_BYTES = 512 * 1024;  // its red zones take room
#else
    static constexpr size_t STACK_BYTES = 128 * 1024;
#endif

    // The fiber of the caller, which has a stack already.
    Fiber() = default;
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;

    ~Fiber() {
        if (mapping_) munmap(mapping_, STACK_BYTES + page());
    }

    // The next switch to this fiber calls `entry`, which must not return.
    void prepare(void (*entry)()) {
        if (!mapping_) {
            mapping_ = mmap(nullptr, STACK_BYTES + page(), PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (mapping_ == MAP_FAILED) {
                mapping_ = nullptr;
                throw std::bad_alloc();
            }
            // Beyond its end a stack hits a page that nobody may touch.
            mprotect(mapping_, page(), PROT_NONE);
        }
        char* bottom = static_cast<char*>(mapping_) + page();
#ifdef GPTKERN_ADDRESS_SANITIZER
        // A fiber that was abandoned left its red zones behind.
        __asan_unpoison_memory_region(bottom, STACK_BYTES);
        fake_stack_ = nullptr;
#endif
#ifdef GPTKERN_OWN_SWITCH
        auto top = reinterpret_cast<uintptr_t>(bottom + STACK_BYTES) & ~uintptr_t(63);
        auto* words = reinterpret_cast<void**>(top);
        *--words = nullptr;  // where a caller's return address would be: the stack is aligned as after a call
        *--words = reinterpret_cast<void*>(entry);
        for (int saved_register = 0; saved_register < 6; ++saved_register) *--words = nullptr;
        stack_pointer_ = words;
#else
        getcontext(&context_);
        context_.uc_stack.ss_sp = bottom;
        context_.uc_stack.ss_size = STACK_BYTES;
        context_.uc_link = nullptr;
        makecontext(&context_, entry, 0);
#endif
    }

    // Leaves this fiber, which is the one that runs, for `next`; returns when somebody switches back.
    void switch_to(Fiber& next, [[maybe_unused]] bool for_good = false) {
#ifdef GPTKERN_ADDRESS_SANITIZER
        const void* bottom = next.mapping_ ? static_cast<char*>(next.mapping_) + page() : next.bottom_;
        size_t size = next.mapping_ ? STACK_BYTES : next.size_;
        __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack_, bottom, size);
#endif
#ifdef GPTKERN_OWN_SWITCH
        gptkern_switch_stacks(&stack_pointer_, next.stack_pointer_);
#else
        swapcontext(&context_, &next.context_);
#endif
        arrived(*this);
    }

    // First thing in a fiber's entry: `caller` is the fiber that runs when no other does.
    static void arrived([[maybe_unused]] Fiber& self) {
#ifdef GPTKERN_ADDRESS_SANITIZER
        const void* bottom;
        size_t size;
        __sanitizer_finish_switch_fiber(self.fake_stack_, &bottom, &size);
#endif
    }

    // Where the stack of the launching thread lies, for AddressSanitizer.
    void set_stack([[maybe_unused]] const void* bottom, [[maybe_unused]] size_t size) {
#ifdef GPTKERN_ADDRESS_SANITIZER
        bottom_ = bottom;
        size_ = size;
#endif
    }

   private:
    static size_t page() {
        static const size_t bytes = size_t(sysconf(_SC_PAGESIZE));
        return bytes;
    }

    void* mapping_ = nullptr;
#ifdef GPTKERN_OWN_SWITCH
    void* stack_pointer_ = nullptr;
#else
    ucontext_t context_{};
#endif
#ifdef GPTKERN_ADDRESS_SANITIZER
    void* fake_stack_ = nullptr;
    const void* bottom_ = nullptr;
    size_t size_ = 0;
#endif
};

}  // namespace gptkern::emulator
