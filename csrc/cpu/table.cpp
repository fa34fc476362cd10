// Compiled once per instruction set beside the kernels: their addresses.
#include "kernels.h"
#include "vec.h"

#define GANKERN_JOIN_(a, b) a##b
#define GANKERN_JOIN(a, b) GANKERN_JOIN_(a, b)

namespace gankern {

int GANKERN_ISA::vector_lanes(Dtype dtype) { return dtype == Dtype::kFloat64 ? kLanes<double> : kLanes<float>; }

extern const KernelTable GANKERN_JOIN(kTable_, GANKERN_ISA);
const KernelTable GANKERN_JOIN(kTable_, GANKERN_ISA) = {&GANKERN_ISA::vector_lanes,
#define GANKERN_ENTRY(name, Args) &GANKERN_ISA::name,
                                                        GANKERN_KERNELS(GANKERN_ENTRY)
#undef GANKERN_ENTRY
};

}  // namespace gankern
