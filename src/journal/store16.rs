//! Two 64-bit words, stored by one instruction.
//!
//! A kill lands between instructions, so a record's delta and check change together or not at
//! all; within a 16-byte boundary they also share a sector, so a power cut cannot part them.

/// Stores both words at `at`, which must be a multiple of 16 counted from an aligned beginning.
#[inline]
#[allow(unsafe_code)]
#[allow(clippy::cast_ptr_alignment)] // The unaligned form of the store is used.
pub fn store16(bytes: &mut [u8], at: usize, low: u64, high: u64) {
    let pair = &mut bytes[at..at + 16];
    #[cfg(target_arch = "x86_64")]
    // SAFETY: `pair` is 16 writable bytes; the unaligned form of the store has no other demand.
    // (On aligned addresses, which all records and cells have, it costs the same.)
    unsafe {
        use std::arch::x86_64::{__m128i, _mm_set_epi64x, _mm_storeu_si128};
        _mm_storeu_si128(
            pair.as_mut_ptr().cast::<__m128i>(),
            _mm_set_epi64x(high as i64, low as i64),
        );
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: `pair` is 16 writable bytes.
    unsafe {
        use std::arch::aarch64::{vcombine_u64, vcreate_u64, vst1q_u64};
        vst1q_u64(
            pair.as_mut_ptr().cast(),
            vcombine_u64(vcreate_u64(low), vcreate_u64(high)),
        );
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    compile_error!("a 16-byte store by one instruction is needed here");
}
