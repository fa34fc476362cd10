// Memory that is used again by the next step, where malloc would give it back to the system and take it page by page.
#pragma once

#include <cstddef>
#include <map>
#include <set>
#include <utility>

namespace gankern {

// Not safe for threads: the bindings use it under Python's lock, which fork() holds, too.
class Workspace {
 public:
    struct Block {
        void* data;
        size_t size;
    };

    // At least so many bytes, aligned to 64. Throws std::bad_alloc.
    Block take(size_t bytes);
    void give(Block block) noexcept;

    // Idle memory above the limit goes back to the system, at once and from then on.
    void set_limit(size_t bytes) noexcept;

    size_t used() const { return used_; }
    size_t idle() const { return idle_; }

 private:
    using Range = std::pair<size_t, char*>;  // size, begin

    void grow(size_t size);
    void add(char* begin, size_t size) noexcept;
    void remove(Range range) noexcept;

    // Idle memory: ranges of whole pages, none of which touches another.
    std::set<Range> by_size_;
    std::map<char*, size_t> by_place_;
    char* end_ = nullptr;  // of what was mapped last
    size_t used_ = 0, idle_ = 0, limit_ = size_t{1} << 30;
};

}  // namespace gankern
