#include "races.h"

#include <algorithm>

namespace gptkern::emulator {

namespace {

constexpr uint8_t WHOLE = 0xf;
constexpr const char* COPY = "cp_async";

bool same(const Moment& a, const Moment& b) { return a.block == b.block && a.warp == b.warp; }

}  // namespace

// --- Shared memory ----------------------------------------------------------------------------------------------------

bool SharedRaces::unordered(const Write& write, const Accessor& by) {
    if (write.moment.block != by.moment.block || write.thread == by.thread) return false;
    return write.thread / WARP != by.thread / WARP || write.moment.warp == by.moment.warp;
}

bool SharedRaces::unordered(const Reads& reads, const Accessor& by) {
    if (reads.moment.block != by.moment.block) return false;
    if (reads.warps & ~(1u << by.thread / WARP)) return true;
    return reads.moment.warp == by.moment.warp && reads.lanes & ~(1u << by.thread % WARP);
}

template <class Visit>
Conflict SharedRaces::each_word(size_t offset, size_t bytes, Visit visit) {
    if (bytes < WORD) return visit(words_[offset / WORD], uint8_t(((1u << bytes) - 1) << offset % WORD));
    for (size_t word = offset / WORD; word < (offset + bytes) / WORD; ++word)
        if (Conflict conflict = visit(words_[word], WHOLE)) return conflict;
    return {};
}

Conflict SharedRaces::with_writes(const Word& word, const Accessor& by, uint8_t mask) {
    if (word.whole.under_way) return {COPY, word.whole.thread, 0, word.whole.site};
    for (const Write* write : {&word.whole, &word.part})
        if (write->mask & mask && unordered(*write, by)) return {"store", write->thread, 0, write->site};
    return {};
}

Conflict SharedRaces::with_reads(const Word& word, const Accessor& by, uint8_t mask) {
    for (const Reads* reads : {&word.whole_reads, &word.part_read})
        if (reads->mask & mask && unordered(*reads, by)) return {"load", reads->thread, 0, reads->site};
    return {};
}

Conflict SharedRaces::load(const Accessor& by, size_t offset, size_t bytes) {
    uint32_t warp = 1u << by.thread / WARP, lane = 1u << by.thread % WARP;
    return each_word(offset, bytes, [&](Word& word, uint8_t mask) {
        Conflict conflict = with_writes(word, by, mask);
        if (conflict) return conflict;
        if (mask != WHOLE) {
            word.part_read = {by.moment, warp, lane, uint16_t(by.thread), mask, by.site};
            return conflict;
        }
        Reads& reads = word.whole_reads;
        if (reads.moment.block != by.moment.block) reads.warps = reads.lanes = 0;
        if (reads.thread / WARP != by.thread / WARP || reads.moment.warp != by.moment.warp) reads.lanes = 0;
        reads = {by.moment, reads.warps | warp, reads.lanes | lane, uint16_t(by.thread), WHOLE, by.site};
        return conflict;
    });
}

Conflict SharedRaces::load_matrix_row(const Accessor& by, size_t offset, size_t bytes) {
    uint32_t warp = 1u << by.thread / WARP;
    return each_word(offset, bytes, [&](Word& word, uint8_t mask) {
        Conflict conflict = with_writes(word, by, mask);
        if (conflict) return conflict;
        Reads& reads = word.whole_reads;
        if (reads.moment.block != by.moment.block) reads.warps = reads.lanes = 0;
        if (reads.thread / WARP != by.thread / WARP || reads.moment.warp != by.moment.warp) reads.lanes = 0;
        reads = {by.moment, reads.warps | warp, reads.lanes, uint16_t(by.thread), WHOLE, by.site};
        return conflict;
    });
}

Conflict SharedRaces::store(const Accessor& by, size_t offset, size_t bytes) {
    return each_word(offset, bytes, [&](Word& word, uint8_t mask) {
        Conflict conflict = with_writes(word, by, mask);
        if (!conflict) conflict = with_reads(word, by, mask);
        if (!conflict) (mask == WHOLE ? word.whole : word.part) = {by.moment, uint16_t(by.thread), mask, false, by.site};
        return conflict;
    });
}

Conflict SharedRaces::issue_copy(const Accessor& by, size_t offset, size_t bytes) {
    return each_word(offset, bytes, [&](Word& word, uint8_t mask) {
        Conflict conflict = with_writes(word, by, mask);
        if (!conflict) conflict = with_reads(word, by, mask);
        if (!conflict) word.whole = {by.moment, uint16_t(by.thread), mask, true, by.site};
        return conflict;
    });
}

void SharedRaces::finish_copy(const Accessor& by, size_t offset, size_t bytes) {
    each_word(offset, bytes, [&](Word& word, uint8_t) {
        word.whole.under_way = false;
        word.whole.moment = by.moment;
        return Conflict{};
    });
}

// --- Global memory ----------------------------------------------------------------------------------------------------

void GlobalRaces::start_launch() {
    // What a large launch needed is given back.
    constexpr size_t FIRST = 1 << 12, KEPT = 1 << 18;
    if (entries_.size() < FIRST || entries_.size() > KEPT) entries_ = std::vector<Entry>(FIRST);
    ++launch_;
    used_ = 0;
}

GlobalRaces::Entry& GlobalRaces::find(uintptr_t granule) {
    size_t mask = entries_.size() - 1;
    size_t place = size_t(granule * 0x9e3779b97f4a7c15u >> 20) & mask;
    while (entries_[place].launch == launch_ && entries_[place].granule != granule) place = (place + 1) & mask;
    return entries_[place];
}

void GlobalRaces::grow() {
    std::vector<Entry> before(entries_.size() * 2);
    before.swap(entries_);
    for (const Entry& entry : before)
        if (entry.launch == launch_) find(entry.granule) = entry;
}

Conflict GlobalRaces::with(const Entry& entry, const Accessor& by, uint32_t block, uint16_t mask) const {
    const char* kind = entry.kind == ATOMIC ? "atomic" : "store";
    if (entry.launch != launch_ || !(entry.block_mask & mask)) return {};
    if (entry.block != block) return {kind, entry.thread, entry.block, entry.site};
    if (!(entry.mask & mask) || entry.thread == by.thread || entry.moment.block != by.moment.block) return {};
    if (entry.thread / 32 == by.thread / 32 && !same(entry.moment, by.moment)) return {};
    return {kind, entry.thread, entry.block, entry.site};
}

Conflict GlobalRaces::load(const Accessor& by, uint32_t block, uintptr_t address, size_t bytes, bool read_only) {
    if (used_ == 0) return {};
    auto mask = uint16_t(((1u << bytes) - 1) << address % GRANULE);
    const Entry& entry = find(address / GRANULE);
    if (read_only && entry.launch == launch_ && entry.block_mask & mask)
        return {"store", entry.thread, entry.block, entry.site};
    return with(entry, by, block, mask);
}

Conflict GlobalRaces::write(const Accessor& by, uint32_t block, uintptr_t address, size_t bytes, Kind kind) {
    auto mask = uint16_t(((1u << bytes) - 1) << address % GRANULE);
    if (2 * used_ > entries_.size()) grow();
    Entry& entry = find(address / GRANULE);
    if (entry.launch != launch_)
        ++used_;
    else if (!(kind == ATOMIC && entry.kind == ATOMIC))
        if (Conflict conflict = with(entry, by, block, mask)) return conflict;
    bool same_block = entry.launch == launch_ && entry.block == block && entry.kind == kind;
    bool same_thread = same_block && entry.thread == by.thread && same(entry.moment, by.moment);
    auto block_mask = uint16_t(mask | (same_block ? entry.block_mask : 0));
    auto own_mask = uint16_t(mask | (same_thread ? entry.mask : 0));
    entry = {address / GRANULE, launch_,  block, block_mask, by.moment, uint16_t(by.thread),
             own_mask,          kind,     by.site};
    return {};
}

}  // namespace gptkern::emulator
