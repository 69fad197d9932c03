//! One counter: 64 bytes, one cache line, the key inline when it is short.

/// Keys up to this length need no memory of their own.
pub(super) const INLINE: usize = 26;

/// The value is the store's, as of `clock`.
pub(super) const KNOWN: u8 = 1;
/// The key exists, in the store or by what is pending.
pub(super) const EXISTS: u8 = 2;
/// Used since the eviction hand passed last.
pub(super) const USED: u8 = 4;
/// The store holds another type under this key.
pub(super) const WRONG_TYPE: u8 = 8;
/// The store holds text that is no 64-bit integer.
pub(super) const NOT_INTEGER: u8 = 16;
/// The store has the key.
pub(super) const STORED: u8 = 64;
/// `value` and `clock` are what a message says, not the store itself.
pub(super) const HEARSAY: u8 = 128;
/// The slot holds a counter (a free one has none of these bits).
pub(super) const TAKEN: u8 = 32;

#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Entry {
    /// Last value known from the store; 0 until it is known.
    pub value: i64,
    /// The store's clock when `value` was true.
    pub clock: u64,
    /// Taken and not yet settled.
    pub pending: i64,
    /// The epoch in which `record` was appended; 0 for none.
    pub epoch: u32,
    /// This epoch's journal record.
    pub record: u32,
    pub key_len: u16,
    /// When `value` was last seen to be the store's, on the table's coarse clock.
    pub seen: u16,
    /// The table's generation when it was last read: in another one messages have been lost since.
    pub generation: u8,
    pub flags: u8,
    /// Short keys whole; of a long one the place in [`LongKeys`] (4 bytes), then its beginning.
    key: [u8; INLINE],
}

const _: () = assert!(size_of::<Entry>() == 64);

impl Entry {
    pub fn new(key: &[u8], long: &mut LongKeys) -> Self {
        let mut inline = [0; INLINE];
        if key.len() <= INLINE {
            inline[..key.len()].copy_from_slice(key);
        } else {
            inline[..4].copy_from_slice(&long.insert(key).to_le_bytes());
            inline[4..INLINE].copy_from_slice(&key[..INLINE - 4]);
        }
        Entry {
            value: 0,
            clock: 0,
            pending: 0,
            epoch: 0,
            record: 0,
            key_len: key.len() as u16,
            seen: 0,
            generation: 0,
            flags: TAKEN,
            key: inline,
        }
    }

    #[inline]
    pub fn holds(&self, key: &[u8], long: &LongKeys) -> bool {
        if usize::from(self.key_len) != key.len() {
            return false;
        }
        if key.len() <= INLINE {
            same(&self.key[..key.len()], key)
        } else {
            self.key[4..INLINE] == key[..INLINE - 4] && long.get(self.long()) == key
        }
    }

    pub fn key<'a>(&'a self, long: &'a LongKeys) -> &'a [u8] {
        let len = usize::from(self.key_len);
        if len <= INLINE {
            &self.key[..len]
        } else {
            long.get(self.long())
        }
    }

    /// Gives back what the key holds outside the entry.
    pub fn free(&mut self, long: &mut LongKeys) {
        if usize::from(self.key_len) > INLINE {
            long.remove(self.long());
        }
        self.flags = 0;
    }

    fn long(&self) -> u32 {
        u32::from_le_bytes([self.key[0], self.key[1], self.key[2], self.key[3]])
    }

    #[inline]
    pub fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

/// Whether two short keys of one length are equal: a comparison of slices would be a call.
#[inline]
fn same(own: &[u8], other: &[u8]) -> bool {
    // The two ends overlap where they have to.
    macro_rules! ends {
        ($word:ty) => {{
            const BYTES: usize = size_of::<$word>();
            if let (Some(a), Some(b)) = (own.first_chunk::<BYTES>(), other.first_chunk())
                && let (Some(c), Some(d)) = (own.last_chunk::<BYTES>(), other.last_chunk())
            {
                return <$word>::from_ne_bytes(*a) == <$word>::from_ne_bytes(*b)
                    && <$word>::from_ne_bytes(*c) == <$word>::from_ne_bytes(*d);
            }
        }};
    }
    const _: () = assert!(INLINE <= 32);
    ends!(u128);
    ends!(u64);
    ends!(u32);
    own.iter().eq(other)
}

/// Keys too long for their entry.
#[derive(Default)]
pub(super) struct LongKeys {
    keys: Vec<Box<[u8]>>,
    free: Vec<u32>,
    bytes: usize,
}

impl LongKeys {
    /// What a long key costs beyond its bytes: the fat pointer and the allocator's header.
    pub const OVERHEAD: usize = 32;

    fn insert(&mut self, key: &[u8]) -> u32 {
        self.bytes += key.len() + Self::OVERHEAD;
        if let Some(at) = self.free.pop() {
            self.keys[at as usize] = key.into();
            at
        } else {
            self.keys.push(key.into());
            (self.keys.len() - 1) as u32
        }
    }

    fn get(&self, at: u32) -> &[u8] {
        &self.keys[at as usize]
    }

    fn remove(&mut self, at: u32) {
        let key = std::mem::take(&mut self.keys[at as usize]);
        self.bytes -= key.len() + Self::OVERHEAD;
        self.free.push(at);
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if either end of a word is left out of the comparison, or the rest of a long key.
    #[test]
    fn an_entry_holds_its_own_key_and_none_that_differs_in_a_byte() {
        let mut long = LongKeys::default();
        for len in 0..=2 * INLINE {
            let key: Vec<u8> = (1..=len as u8).collect();
            let entry = Entry::new(&key, &mut long);
            assert_eq!(entry.key(&long), key);
            assert!(entry.holds(&key, &long));
            for place in 0..len {
                let mut other = key.clone();
                other[place] ^= 0x80;
                assert!(!entry.holds(&other, &long), "{len} bytes, {place}");
            }
            assert!(!entry.holds(&[&key[..], b"x"].concat(), &long));
        }
    }
}
