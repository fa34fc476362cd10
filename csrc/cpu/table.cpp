// Compiled once per instruction set beside the kernels: their addresses.
#include "kernels.h"

#define GANKERN_JOIN_(a, b) a##b
#define GANKERN_JOIN(a, b) GANKERN_JOIN_(a, b)

namespace gankern {

extern const KernelTable GANKERN_JOIN(kTable_, GANKERN_ISA);
const KernelTable GANKERN_JOIN(kTable_, GANKERN_ISA) = {
#define GANKERN_ENTRY(name, Args) &GANKERN_ISA::name,
    GANKERN_KERNELS(GANKERN_ENTRY)
#undef GANKERN_ENTRY
};

}  // namespace gankern
