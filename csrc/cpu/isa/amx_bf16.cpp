#include "../kernels.h"
#if defined(__x86_64__)
namespace permattn::cpu {
Kernels amx_bf16_kernels(Dtype) { return {}; }
}
#endif
