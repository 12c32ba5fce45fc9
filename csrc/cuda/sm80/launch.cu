// From a config to the launch of its kernel. Kernels are compiled in instantiations/.
#include "../attend.h"
#include "dispatch.h"

namespace permattn::sm80 {

template <Dtype kDtype, Format kQk, Format kPv>
const char* launch_formats(const cuda::AttentionArgs& args, const cuda::Config& config,
                           void* stream);

const char* launch_attend(const cuda::AttentionArgs& args, const cuda::Config& config,
                          void* stream) {
  return visit_formats(config, args.out_dtype,
                       [&]<Dtype kDtype, Format kQk, Format kPv>(Formats<kDtype, kQk, kPv>) {
                         return launch_formats<kDtype, kQk, kPv>(args, config, stream);
                       });
}

}  // namespace permattn::sm80
