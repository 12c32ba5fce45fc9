// Four products of bytes in one instruction (vpdpbusd).
struct VnniBytes {
  using Signed = VecI;
  using Unsigned = VecI;

  PERMATTN_INLINE VecI as_unsigned(VecI x) { return x; }
  PERMATTN_INLINE VecI as_signed(VecI x) { return x; }
  PERMATTN_INLINE VecI add(VecI acc, VecI a, VecI b) {
    return reinterpret_cast<VecI>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(acc),
                                                      reinterpret_cast<__m512i>(a),
                                                      reinterpret_cast<__m512i>(b)));
  }
};
