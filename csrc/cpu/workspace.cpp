#include "gankern/workspace.h"

#include <sys/mman.h>

#include <cstdint>
#include <iterator>
#include <new>

namespace gankern {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kPage = size_t{4} << 10;

size_t round_up(size_t size, size_t unit) { return (size + unit - 1) / unit * unit; }

// Whole huge pages, beginning where one can: one page fault instead of 512.
char* map(size_t size) {
    void* raw = mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (raw == MAP_FAILED) throw std::bad_alloc();
    auto begin = reinterpret_cast<uintptr_t>(raw), data = round_up(begin, kHugePage);
    if (data > begin) munmap(raw, data - begin);
    size_t behind = begin + kHugePage - data;
    if (behind > 0) munmap(reinterpret_cast<void*>(data + size), behind);
#ifdef MADV_HUGEPAGE
    madvise(reinterpret_cast<void*>(data), size, MADV_HUGEPAGE);
#endif
    return reinterpret_cast<char*>(data);
}

}  // namespace

void Workspace::remove(Range range) noexcept {
    by_size_.erase(range);
    by_place_.erase(range.second);
    idle_ -= range.first;
}

// Together with the ranges that it touches.
void Workspace::add(char* begin, size_t size) noexcept {
    auto next = by_place_.lower_bound(begin);
    if (next != by_place_.end() && next->first == begin + size) {
        Range behind{next->second, next->first};
        ++next;
        size += behind.first;
        remove(behind);
    }
    if (next != by_place_.begin()) {
        Range before{std::prev(next)->second, std::prev(next)->first};
        if (before.second + before.first == begin) {
            begin = before.second;
            size += before.first;
            remove(before);
        }
    }
    by_size_.emplace(size, begin);
    by_place_.emplace(begin, size);
    idle_ += size;
}

Workspace::Block Workspace::take(size_t bytes) {
    size_t size = round_up(bytes, kPage), mapped = round_up(size, kHugePage);
    if (size < bytes || mapped < size) throw std::bad_alloc();
    // The smallest range that is large enough; what is left of it stays idle.
    auto found = by_size_.lower_bound({size, nullptr});
    if (found == by_size_.end()) {
        add(map(mapped), mapped);
        found = by_size_.lower_bound({size, nullptr});
    }
    Range range = *found;
    remove(range);
    if (range.first > size) add(range.second + size, range.first - size);
    used_ += size;
    return {range.second, size};
}

void Workspace::give(Block block) noexcept {
    used_ -= block.size;
    add(static_cast<char*>(block.data), block.size);
    set_limit(limit_);
}

void Workspace::set_limit(size_t bytes) noexcept {
    limit_ = bytes;
    while (idle_ > limit_) {
        Range largest = *by_size_.rbegin();
        remove(largest);
        munmap(largest.second, largest.first);
    }
}

}  // namespace gankern
