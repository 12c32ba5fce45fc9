// What the arithmetic of every instruction set needs, in order.
#include "vec.inl"
#include "lanes.inl"
#include "gemm.inl"
#include "rows.inl"
#include "rounding.inl"
