// Finds accesses of two threads that nothing orders, whichever of them the schedule takes first.
//
// Accesses to shared memory are ordered within a thread, by the block's barriers, and within a warp by warp_sync alone:
// other collectives order no memory (CUDA C++ Programming Guide, "Warp Shuffle Functions"). All threads that run are
// between the same two barriers of their block, and the lanes of a warp that run between the same two of their warp. So
// an access conflicts with an earlier one of another thread where their `Moment`s are the same, and one of them writes.
//
// A cp.async writes from its issue until the wait that covers it, for everybody.
//
// Global memory is looked at where the kernel writes it: by other blocks, which nothing orders, and by other threads of
// the block. Loads that precede a store are not remembered there; blocks run in any order, so some seed has them late.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <vector>

namespace gptkern::emulator {

using Site = std::source_location;

struct Moment {
    uint32_t block = 0;  // barriers of the block so far, counted on from block to block; 0: never
    uint32_t warp = 0;   // of the warp
};

struct Accessor {
    Moment moment;
    unsigned thread;  // of the block
    Site site;
};

// An access that conflicts with the one that is asked about.
struct Conflict {
    const char* kind = nullptr;  // null: there is none
    unsigned thread = 0, block = 0;
    Site site{};
    explicit operator bool() const { return kind != nullptr; }
};

class SharedRaces {
   public:
    void start_launch(size_t shared_bytes) { words_.assign(shared_bytes / WORD + 1, Word{}); }

    // An access to the bytes from `offset` on; each remembers itself where nothing conflicts.
    Conflict load(const Accessor& by, size_t offset, size_t bytes);
    Conflict store(const Accessor& by, size_t offset, size_t bytes);
    // A row of a matrix, by all lanes of the warp: what they do afterwards comes after it.
    Conflict load_matrix_row(const Accessor& by, size_t offset, size_t bytes);
    Conflict issue_copy(const Accessor& by, size_t offset, size_t bytes);
    void finish_copy(const Accessor& by, size_t offset, size_t bytes);

   private:
    static constexpr unsigned WORD = 4, WARP = 32;

    struct Write {
        Moment moment;
        uint16_t thread = 0;
        uint8_t mask = 0;        // bytes of the word
        bool under_way = false;  // a cp.async that nobody has waited for
        Site site{};
    };
    // All that read the word in one block-wide moment: which warps, and of the last of them which lanes.
    struct Reads {
        Moment moment;
        uint32_t warps = 0, lanes = 0;
        uint16_t thread = 0;  // the last
        uint8_t mask = 0;
        Site site{};
    };
    // Accesses of a part of the word are remembered beside those of all of it, the last one only: two lanes that write a
    // half each do not conflict.
    struct Word {
        Write whole, part;
        Reads whole_reads, part_read;
    };

    static bool unordered(const Write& write, const Accessor& by);
    static bool unordered(const Reads& reads, const Accessor& by);
    template <class Visit>
    Conflict each_word(size_t offset, size_t bytes, Visit visit);
    static Conflict with_writes(const Word& word, const Accessor& by, uint8_t mask);
    static Conflict with_reads(const Word& word, const Accessor& by, uint8_t mask);

    std::vector<Word> words_;
};

class GlobalRaces {
   public:
    void start_launch();

    enum Kind : uint8_t { STORE, ATOMIC };
    // `read_only`: through the cache that does not see what the kernel writes.
    Conflict load(const Accessor& by, uint32_t block, uintptr_t address, size_t bytes, bool read_only);
    Conflict write(const Accessor& by, uint32_t block, uintptr_t address, size_t bytes, Kind kind);

   private:
    static constexpr size_t GRANULE = 16;

    // 16 bytes of memory: what the last block that wrote there has written of them, and its last thread.
    struct Entry {
        uintptr_t granule = 0;
        uint32_t launch = 0, block = 0;
        uint16_t block_mask = 0;
        Moment moment;
        uint16_t thread = 0, mask = 0;
        Kind kind = STORE;
        Site site{};
    };

    Entry& find(uintptr_t granule);
    Conflict with(const Entry& entry, const Accessor& by, uint32_t block, uint16_t mask) const;
    void grow();

    std::vector<Entry> entries_;
    size_t used_ = 0;
    uint32_t launch_ = 0;
};

}  // namespace gptkern::emulator
