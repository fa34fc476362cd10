#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

#ifdef GANKERN_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace gankern {

extern const KernelTable kTable_baseline;
#ifdef GANKERN_X86
extern const KernelTable kTable_avx2;
extern const KernelTable kTable_avx512;
#endif

#ifdef GANKERN_AMX
namespace amx {
void conv_bfloat16_forward(const ConvBFloat16&);
void conv_bfloat16_input_grad(const ConvBFloat16&);
void conv_bfloat16_weight_grad(const ConvBFloat16WeightGrad&);
}  // namespace amx
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

#ifdef GANKERN_AMX
// Whether processor and system let this process use bfloat16 tiles; the system is asked for them.
bool has_matrix_units() {
    unsigned eax, ebx, ecx, edx;
    constexpr unsigned kTiles = 1u << 24, kBFloat16Tiles = 1u << 22, kBFloat16Vectors = 1u << 5;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(edx & kTiles) || !(edx & kBFloat16Tiles)) return false;
    if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) || !(eax & kBFloat16Vectors)) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

}  // namespace

const MatrixKernels* matrix_kernels() {
#ifdef GANKERN_AMX
    static const MatrixKernels table{&amx::conv_bfloat16_forward, &amx::conv_bfloat16_input_grad,
                                     &amx::conv_bfloat16_weight_grad};
    static const bool usable = chosen().name == std::string("avx512") && has_matrix_units();
    return usable ? &table : nullptr;
#else
    return nullptr;
#endif
}

const KernelTable& kernels() { return *chosen().table; }
const char* cpu_isa() { return chosen().name; }

}  // namespace gankern
