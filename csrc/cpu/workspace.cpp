#include "gankern/workspace.h"

#include <sys/mman.h>

#include <cstdint>
#include <iterator>
#include <new>

namespace gankern {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kPage = size_t{4} << 10;
// Memory beside which what a whole huge page is more than needed does not count.
constexpr size_t kMany = size_t{32} << 20;

size_t round_up(size_t size, size_t unit) { return (size + unit - 1) / unit * unit; }

char* try_map(char* place, size_t size, int protection, int flags) {
    void* found = mmap(place, size, protection, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
    return found == MAP_FAILED ? nullptr : static_cast<char*>(found);
}

// Where much memory has room that nobody else will be given for long: the system looks for room from above.
char* find_room() {
    for (size_t size = size_t{1} << 40; size > kHugePage; size /= 2) {
        char* found = try_map(nullptr, size, PROT_NONE, MAP_NORESERVE);
        if (found == nullptr) continue;
        munmap(found, size);
        return reinterpret_cast<char*>(round_up(reinterpret_cast<uintptr_t>(found), kHugePage));
    }
    return nullptr;
}

// At a place, or where there is room.
char* map(char* place, size_t size) {
    char* found = try_map(place, size, PROT_READ | PROT_WRITE, 0);
    if (found == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    // One page fault instead of 512 wherever a whole huge page lies inside.
    madvise(found, size, MADV_HUGEPAGE);
#endif
    return found;
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

// Behind what there is, so that memory given back in small parts serves large ones.
void Workspace::grow(size_t size) {
    size_t total = used_ + idle_;
    if (total == 0) end_ = find_room();
    auto last = by_place_.lower_bound(end_);
    bool touches = last != by_place_.begin() && std::prev(last)->first + std::prev(last)->second == end_;
    size_t more = size - (touches ? std::prev(last)->second : 0);
    if (total + more > kMany)
        more = round_up(reinterpret_cast<uintptr_t>(end_) + more, kHugePage) - reinterpret_cast<uintptr_t>(end_);
    char* begin = map(end_, more);
    if (begin != end_ && more < size) {
        munmap(begin, more);
        begin = map(nullptr, more = round_up(size, kHugePage));
    }
    end_ = begin + more;
    add(begin, more);
}

Workspace::Block Workspace::take(size_t bytes) {
    size_t size = round_up(bytes, kPage);
    if (size < bytes || round_up(size, kHugePage) < size) throw std::bad_alloc();
    // The smallest range that is large enough; what is left of it stays idle.
    auto found = by_size_.lower_bound({size, nullptr});
    if (found == by_size_.end()) {
        grow(size);
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
        if (largest.second + largest.first == end_) end_ = largest.second;
    }
}

}  // namespace gankern
