//! The bytes of a segment file. Drawn here, once; a golden file in `tests/golden` pins them.
//!
//! All integers are little-endian. A *cell* is a 64-bit value followed by its check; cells and the
//! first 16 bytes of records lie on 16-byte boundaries and are written by one store, so that
//! neither a kill nor a torn sector leaves half of one.
//!
//! ```text
//! 0     "TALLYSEG"            magic
//! 8     u32  format           1
//! 12    u32  batch keys       records a batch
//! 16    u128 node id
//! 32    u64  segment number   from 1, without gaps as long as nothing was lost
//! 40    u64  created          Unix time in ms
//! 48    u64  check            XXH3-64 of bytes 0..48
//! 64    cell first batch      number of the segment's first batch; written when the segment becomes the open one
//! 80    cell end              where the records end, from the file's beginning
//! 96    cell sealed           1 + number of records; 0 while open
//! 112   cell applied          number of the last batch known to be in the store
//! 2048  cell first batch      once more, in another sector: nothing else tells this number
//! 4096  records
//! end   u32 × batches         sealed only: where each batch begins
//!       u64  check            XXH3-64 of the table above, seeded with the segment's salt
//! ```
//!
//! A record, padded to 16 bytes:
//!
//! ```text
//! 0     i64  delta
//! 8     u64  check            seed + DELTA_FACTOR × delta, wrapping
//! 16    u32  key length
//! 20    key
//! ```
//!
//! The seed is XXH3-64 of the key, seeded with the segment's salt plus the record's place; the
//! salt is XXH3-64 of node id and segment number. So a record that is stale, moved, or of another
//! segment does not pass. The check is linear in the delta so that an increment updates both
//! words from what is there, without hashing: adding `d` adds `DELTA_FACTOR × d`; as the factor is
//! odd, a changed delta never keeps its check.

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use crate::store::NodeId;

/// First bytes of every segment.
pub const MAGIC: &[u8; 8] = b"TALLYSEG";
/// The only format there is.
pub const FORMAT: u32 = 1;
/// Bytes of a header with its check.
pub const HEADER_BYTES: usize = 56;
/// Where records begin.
pub const RECORDS_AT: usize = 4096;
/// Bytes of a record before its key.
pub const RECORD_HEAD: usize = 20;
/// Odd, so that multiplying is a bijection of 64 bits (2^64 divided by the golden ratio).
pub const DELTA_FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

/// Where the cells are.
pub const FIRST_BATCH_AT: usize = 64;
/// See [`FIRST_BATCH_AT`].
pub const END_AT: usize = 80;
/// See [`FIRST_BATCH_AT`].
pub const SEALED_AT: usize = 96;
/// See [`FIRST_BATCH_AT`].
pub const APPLIED_AT: usize = 112;
/// See [`FIRST_BATCH_AT`]: its copy.
pub const FIRST_BATCH_COPY_AT: usize = 2048;

/// No key is longer (`limits.max_key_bytes` has the same bound): a damaged length is refused
/// before that many bytes are hashed, so reading any file takes time linear in its size.
pub const KEY_BYTES_MAX: usize = 65_535;

/// The part of the header that never changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Whose segment it is.
    pub node: NodeId,
    /// Its number.
    pub number: u64,
    /// Records a batch.
    pub batch_keys: u32,
    /// Unix time in milliseconds.
    pub created_ms: u64,
}

/// Why a header is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Too short, or other bytes at the beginning.
    #[error("not a tallyd segment")]
    NotASegment,
    /// Bits have changed.
    #[error("the header's check sum is wrong")]
    Check,
    /// Written by a newer tallyd.
    #[error("format {0}, and this tallyd reads format {FORMAT}")]
    Format(u32),
}

impl Header {
    /// The header's bytes with its check.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&FORMAT.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.batch_keys.to_le_bytes());
        bytes[16..32].copy_from_slice(&self.node.0.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.number.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.created_ms.to_le_bytes());
        let check = xxh3_64(&bytes[..48]);
        bytes[48..].copy_from_slice(&check.to_le_bytes());
        bytes
    }

    /// Reads a header.
    ///
    /// # Errors
    /// See [`HeaderError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, HeaderError> {
        if bytes.len() < HEADER_BYTES || bytes[..8] != *MAGIC {
            return Err(HeaderError::NotASegment);
        }
        // A newer format may place its check elsewhere, so its number is looked at first. But a
        // header that is sound with our number in it is ours, with the number damaged.
        let format = u32_at(bytes, 8);
        let mut ours = [0; 48];
        ours.copy_from_slice(&bytes[..48]);
        ours[8..12].copy_from_slice(&FORMAT.to_le_bytes());
        let check = u64_at(bytes, 48);
        if format > FORMAT && check != xxh3_64(&ours) {
            return Err(HeaderError::Format(format));
        }
        if format != FORMAT || check != xxh3_64(&bytes[..48]) {
            return Err(HeaderError::Check);
        }
        let mut node = [0; 16];
        node.copy_from_slice(&bytes[16..32]);
        Ok(Header {
            node: NodeId(u128::from_le_bytes(node)),
            number: u64_at(bytes, 32),
            batch_keys: u32_at(bytes, 12).max(1),
            created_ms: u64_at(bytes, 40),
        })
    }

    /// Rebuilds a damaged header from what is known without it: the node and the number, which
    /// the file's name tells. `true`: the check of the damaged header confirms every field, so that
    /// the damage lies elsewhere in it.
    ///
    /// The result is a guess until something in the segment passes a check with its salt.
    pub fn rebuild(bytes: &[u8], node: NodeId, number: u64, batch_keys: u32) -> (Self, bool) {
        let mut stored = [0; HEADER_BYTES];
        let there = bytes.len().min(HEADER_BYTES);
        stored[..there].copy_from_slice(&bytes[..there]);
        let guess = |batch_keys| Header {
            node,
            number,
            batch_keys,
            created_ms: u64_at(&stored, 40),
        };
        for batch_keys in [u32_at(&stored, 12), batch_keys] {
            let header = guess(batch_keys);
            if batch_keys > 0 && u64_at(&header.encode(), 48) == u64_at(&stored, 48) {
                return (header, true);
            }
        }
        (guess(batch_keys.max(1)), false)
    }

    /// What seeds every check in this segment.
    pub fn salt(&self) -> u64 {
        let mut bytes = [0; 24];
        bytes[..16].copy_from_slice(&self.node.0.to_le_bytes());
        bytes[16..].copy_from_slice(&self.number.to_le_bytes());
        xxh3_64(&bytes)
    }
}

/// Bytes that a record takes.
#[inline]
pub fn record_bytes(key_len: usize) -> usize {
    (RECORD_HEAD + key_len).next_multiple_of(16)
}

/// The check of a record whose delta is 0.
#[inline]
pub fn record_seed(salt: u64, at: usize, key: &[u8]) -> u64 {
    xxh3_64_with_seed(key, salt.wrapping_add(at as u64))
}

/// The check of a record.
#[inline]
pub fn record_check(seed: u64, delta: i64) -> u64 {
    seed.wrapping_add(DELTA_FACTOR.wrapping_mul(delta as u64))
}

/// The check of the cell at `at`.
pub fn cell_check(salt: u64, at: usize, value: u64) -> u64 {
    xxh3_64_with_seed(&value.to_le_bytes(), salt ^ (at as u64))
}

/// Reads a cell. `Ok(None)`: never written. `Err`: damaged.
///
/// # Errors
/// The bytes found.
pub fn cell(bytes: &[u8], at: usize, salt: u64) -> Result<Option<u64>, [u64; 2]> {
    let (value, check) = (u64_at(bytes, at), u64_at(bytes, at + 8));
    if check == cell_check(salt, at, value) {
        Ok(Some(value))
    } else if value == 0 && check == 0 {
        Ok(None)
    } else {
        Err([value, check])
    }
}

/// One record, read and checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record<'a> {
    /// Its key.
    pub key: &'a [u8],
    /// The sum of its epoch.
    pub delta: i64,
    /// Where the next one begins.
    pub next: usize,
}

/// Reads the record at `at`, which must end by `end`; `None`: it is not sound.
pub fn record(bytes: &[u8], at: usize, end: usize, salt: u64) -> Option<Record<'_>> {
    if at + RECORD_HEAD > end || end > bytes.len() {
        return None;
    }
    let key_len = u32_at(bytes, at + 16) as usize;
    if key_len > KEY_BYTES_MAX {
        return None;
    }
    let next = at + record_bytes(key_len);
    if next > end {
        return None;
    }
    let key = &bytes[at + RECORD_HEAD..at + RECORD_HEAD + key_len];
    let delta = u64_at(bytes, at) as i64;
    (u64_at(bytes, at + 8) == record_check(record_seed(salt, at, key), delta)).then_some(Record {
        key,
        delta,
        next,
    })
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}
