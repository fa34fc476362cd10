#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace gankern {

extern const KernelTable kTable_baseline;
#ifdef GANKERN_X86
extern const KernelTable kTable_avx2;
extern const KernelTable kTable_avx512;
#endif

namespace {

struct Isa {
    const char* name;
    const KernelTable* table;
    bool supported;
};

const Isa& chosen() {
    static const Isa isa = [] {
        // Best first.
        const Isa known[] = {
#ifdef GANKERN_X86
            {"avx512", &kTable_avx512,
             __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")},
            {"avx2", &kTable_avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
            {"baseline", &kTable_baseline, true},
        };
        const char* wanted = std::getenv("GANKERN_CPU_ISA");
        std::string names;
        for (const Isa& i : known) {
            if (!wanted || !*wanted ? i.supported : i.name == std::string(wanted)) {
                if (!i.supported)
                    throw std::runtime_error("GANKERN_CPU_ISA=" + std::string(wanted) + ": this processor lacks it");
                return i;
            }
            names += std::string(names.empty() ? "" : ", ") + i.name;
        }
        throw std::runtime_error("GANKERN_CPU_ISA must be one of " + names + "; got '" + wanted + "'");
    }();
    return isa;
}

}  // namespace

const KernelTable& kernels() { return *chosen().table; }
const char* cpu_isa() { return chosen().name; }

}  // namespace gankern
