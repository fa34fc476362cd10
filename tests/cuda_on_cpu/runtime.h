// What runs a kernel's threads on one processor, for cuda_on_cpu.h; compiled once, not with each kernel.
#pragma once

#include <array>
#include <cstddef>

namespace cuda_on_cpu {

struct Index {
    unsigned x, y, z;
};

constexpr unsigned kWarpSize = 32;

extern Index grid_size, block_size, block_index, thread_index;

[[noreturn]] void fail(const char* what);
unsigned thread_number();

void block_barrier();
void warp_barrier(unsigned mask);

// The array of one declaration in the block that runs: everyone's first meeting with it makes it.
void* shared_array(const void* declaration, int line, size_t bytes);
void* dynamic_shared();

// The value of the lane that source tells; the thread's own where that lane is not in the mask.
using Source = unsigned (*)(unsigned lane, unsigned operand);
unsigned long long shuffle(unsigned mask, unsigned long long value, Source source, unsigned operand);

// The factors that a warp's lanes hand to a matrix unit: four words of the left one, two of the right one.
using Words = std::array<std::array<unsigned, 6>, kWarpSize>;
const Words& exchange(const unsigned (&left)[4], const unsigned (&right)[2]);

// Runs entry(arguments) on every thread of a grid: sizes are the grid's and a block's.
void run(void (*entry)(void*), void* arguments, const unsigned* sizes, size_t dynamic_shared, unsigned seed);

}  // namespace cuda_on_cpu
