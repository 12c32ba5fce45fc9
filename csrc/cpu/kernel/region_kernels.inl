// Entries of the table of an instruction set.

template <class Math, int H>
static void add_region_forward(RegionKernels& kernels) {
  if constexpr (H <= kWidth) {
    kernels.forward[log2_of(H)] = region_forward<Math, H>;
    kernels.forward_scratch[log2_of(H)] = region_forward_scratch<Math, H>;
  }
}

template <class Math>
static void add_region_forwards(RegionKernels& kernels) {
  kernels.lanes = kMaxLanes;
  add_region_forward<Math, 1>(kernels);
  add_region_forward<Math, 2>(kernels);
  add_region_forward<Math, 4>(kernels);
  add_region_forward<Math, 8>(kernels);
}
