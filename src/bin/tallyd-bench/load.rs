//! The requests, encoded before the clock starts.
//!
//! Invariants:
//!
//! 1. A load of up to [`RING_MAX`] requests is encoded whole, and each is sent once. The counters of a run are thus a
//!    function of its arguments alone, however connections share the work.
//! 2. A longer load repeats its first [`RING_MAX`] requests, as a ring: memory is bounded, and the mix of keys the same.
//!    Keys that a longer draw would have met later are then not met; `distinct` counts what is really sent.
//! 3. Requests lie in the order of sending, so a burst is one contiguous slice, and the walk is sequential.

use std::ops::Range;

use fastrand::Rng;

use crate::zipf::Zipf;

/// Most requests held at a time, some 150 MB with a short prefix.
pub const RING_MAX: usize = 4 << 20;
/// Most keys; a bit each counts the distinct ones.
pub const KEYS_MAX: u32 = 1_000_000_000;
/// Longest key prefix, in bytes.
pub const PREFIX_BYTES_MAX: usize = 64;

const HEAD: &[u8] = b"*2\r\n$4\r\nINCR\r\n$";
/// Head, two digits of length, prefix, ten digits of rank, two line ends.
const REQUEST_BYTES_MAX: usize = HEAD.len() + 2 + 2 + PREFIX_BYTES_MAX + 10 + 2;
const _: () = assert!(
    RING_MAX * REQUEST_BYTES_MAX <= u32::MAX as usize,
    "offsets are 32 bits wide"
);

/// What to encode.
#[derive(Debug, Clone)]
pub struct LoadSpec<'a> {
    /// Requests to send in all.
    pub ops: u64,
    /// Keys to choose from, ranks `1..=keys`.
    pub keys: u32,
    /// Exponent of the distribution; 0 is uniform.
    pub zipf: f64,
    /// What a key is before its rank.
    pub prefix: &'a str,
    /// Seed of the choice.
    pub seed: u64,
}

/// Encoded requests, back to back.
#[derive(Debug)]
pub struct Load {
    bytes: Vec<u8>,
    /// Where each request begins, and where the last one ends.
    offsets: Vec<u32>,
    distinct: u64,
}

impl Load {
    /// Draws the keys and encodes their requests.
    pub fn encode(spec: &LoadSpec<'_>) -> Self {
        Self::encode_ring(spec, RING_MAX)
    }

    fn encode_ring(spec: &LoadSpec<'_>, ring_max: usize) -> Self {
        let count = usize::try_from(spec.ops).map_or(ring_max, |ops| ops.min(ring_max));
        let zipf = Zipf::new(spec.keys, spec.zipf);
        let mut rng = Rng::with_seed(spec.seed);
        let mut seen = vec![0_u64; spec.keys as usize / 64 + 1];
        let mut distinct = 0;
        let mut bytes = Vec::with_capacity(count * (HEAD.len() + spec.prefix.len() + 14));
        let mut offsets = Vec::with_capacity(count + 1);
        let (mut length, mut digits) = (itoa::Buffer::new(), itoa::Buffer::new());

        offsets.push(0);
        for _ in 0..count {
            let rank = zipf.sample(&mut rng);
            let (word, bit) = (rank as usize / 64, 1 << (rank % 64));
            distinct += u64::from(seen[word] & bit == 0);
            seen[word] |= bit;

            let rank = digits.format(rank);
            bytes.extend_from_slice(HEAD);
            bytes.extend_from_slice(length.format(spec.prefix.len() + rank.len()).as_bytes());
            bytes.extend_from_slice(b"\r\n");
            bytes.extend_from_slice(spec.prefix.as_bytes());
            bytes.extend_from_slice(rank.as_bytes());
            bytes.extend_from_slice(b"\r\n");
            offsets.push(bytes.len() as u32);
        }
        Self {
            bytes,
            offsets,
            distinct,
        }
    }

    /// How many requests the ring holds.
    pub fn len(&self) -> usize {
        self.offsets.len() - 1
    }

    /// All requests as bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Where in [`bytes`](Self::bytes) the requests numbered `requests` are.
    pub fn span(&self, requests: Range<usize>) -> Range<usize> {
        self.offsets[requests.start] as usize..self.offsets[requests.end] as usize
    }

    /// How many different keys it has.
    pub fn distinct(&self) -> u64 {
        self.distinct
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(ops: u64, seed: u64) -> LoadSpec<'static> {
        LoadSpec {
            ops,
            keys: 1000,
            zipf: 1.0,
            prefix: "likes:",
            seed,
        }
    }

    #[test]
    fn requests_are_arrays_of_bulk_strings_cut_at_their_boundaries() {
        let load = Load::encode(&LoadSpec {
            keys: 1,
            ..spec(3, 1)
        });
        let request = b"*2\r\n$4\r\nINCR\r\n$7\r\nlikes:1\r\n";
        assert_eq!(load.len(), 3);
        assert_eq!(&load.bytes()[load.span(1..2)], request);
        assert_eq!(load.bytes()[load.span(0..3)], request.repeat(3));
        assert_eq!(load.distinct(), 1);
    }

    #[test]
    fn a_seed_gives_the_same_requests_and_another_one_others() {
        assert_eq!(
            Load::encode(&spec(500, 1)).bytes,
            Load::encode(&spec(500, 1)).bytes
        );
        assert_ne!(
            Load::encode(&spec(500, 1)).bytes,
            Load::encode(&spec(500, 2)).bytes
        );
    }

    #[test]
    fn distinct_keys_are_those_really_encoded() {
        let load = Load::encode(&spec(2000, 1));
        let keys: std::collections::HashSet<_> = (0..load.len())
            .map(|at| &load.bytes()[load.span(at..at + 1)])
            .collect();
        assert_eq!(load.distinct(), keys.len() as u64);
    }

    #[test]
    fn a_load_beyond_the_bound_is_a_ring() {
        assert_eq!(Load::encode_ring(&spec(u64::MAX, 1), 64).len(), 64);
    }
}
