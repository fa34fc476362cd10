#include "gankern/workspace.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

namespace gankern {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kPage = size_t{4} << 10;

size_t round_up(size_t size, size_t unit) { return (size + unit - 1) / unit * unit; }

void* map(size_t size) {
    // Large blocks begin where a huge page can: one page fault instead of 512.
    size_t spare = size < kHugePage ? 0 : kHugePage;
    void* raw = mmap(nullptr, size + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (raw == MAP_FAILED) throw std::bad_alloc();
    if (spare == 0) return raw;
    auto begin = reinterpret_cast<uintptr_t>(raw), data = round_up(begin, kHugePage);
    if (data > begin) munmap(raw, data - begin);
    size_t behind = begin + spare - data;
    if (behind > 0) munmap(reinterpret_cast<void*>(data + size), behind);
#ifdef MADV_HUGEPAGE
    madvise(reinterpret_cast<void*>(data), size, MADV_HUGEPAGE);
#endif
    return reinterpret_cast<void*>(data);
}

}  // namespace

Workspace::Block Workspace::take(size_t bytes) {
    size_t size = round_up(bytes, bytes < kHugePage ? kPage : kHugePage);
    if (size < bytes) throw std::bad_alloc();
    auto found = free_.lower_bound(size);
    Block block{};
    // Not one of more than twice the size, which a larger tensor of the same step will ask for.
    if (found != free_.end() && found->first / 2 <= size) {
        block = {found->second, found->first};
        free_.erase(found);
        idle_ -= block.size;
    } else {
        block = {map(size), size};
    }
    used_ += block.size;
    return block;
}

void Workspace::give(Block block) noexcept {
    used_ -= block.size;
    // Before others of its size: the block used last, which the caches may still hold, is the next to be taken.
    free_.emplace_hint(free_.lower_bound(block.size), block.size, block.data);
    idle_ += block.size;
    set_limit(limit_);
}

void Workspace::set_limit(size_t bytes) noexcept {
    limit_ = bytes;
    while (idle_ > limit_) {
        auto largest = --free_.end();
        munmap(largest->second, largest->first);
        idle_ -= largest->first;
        free_.erase(largest);
    }
}

}  // namespace gankern
