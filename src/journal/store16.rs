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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sixteen_bytes_are_stored_and_none_around_them() {
        let mut bytes = vec![0xee; 64];
        store16(&mut bytes, 16, 0x0807_0605_0403_0201, u64::MAX);
        let mut expected = [0xee; 64];
        expected[16..24].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]);
        expected[24..32].fill(0xff);
        assert_eq!(bytes, expected);
        store16(&mut bytes, 48, 0, 0);
        assert_eq!((bytes[47], &bytes[48..]), (0xee, &[0; 16][..]));
    }

    #[test]
    #[should_panic(expected = "out of range")]
    fn what_lies_beyond_the_end_is_refused() {
        store16(&mut [0; 31], 16, 0, 0);
    }
}
