//! A hint to the processor, where it has one.
//!
//! Commands are applied in groups so that the cache misses of a group overlap: at a million keys
//! almost every command misses three times (index slot, entry, journal record).

/// Asks for the cache line that holds `value`; never faults, changes nothing.
#[inline(always)]
#[allow(unsafe_code, clippy::inline_always)]
pub fn prefetch<T>(value: &T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch is a hint; the address comes from a reference and is not dereferenced.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(value).cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = value;
}
