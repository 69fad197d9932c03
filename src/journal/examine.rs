//! Reads a segment file as it lies on the disk, sound or not, and changes nothing.
//!
//! Used by recovery and by `tallyd journal show` and `verify`; works beside a running daemon.

use std::fs::File;
use std::io;
use std::path::Path;

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::format::{
    self, APPLIED_AT, END_AT, FIRST_BATCH_AT, Header, HeaderError, RECORDS_AT, SEALED_AT, cell,
    record,
};
use super::segment::{map_read, table_bytes};

/// What a segment file holds.
#[derive(Debug)]
pub struct Examined {
    /// Its header.
    pub header: Header,
    /// Number of its first batch; `None`: it never became the open segment.
    pub first_batch: Option<u64>,
    /// Whether it was sealed.
    pub sealed: bool,
    /// Last batch known to be in the store.
    pub applied: Option<u64>,
    /// Where its records end.
    pub end: usize,
    /// Sound records.
    pub records: u32,
    /// Sum of the sound records' deltas (wider than any of them).
    pub sum: i128,
    /// Where each batch begins, in 16-byte units.
    pub batch_starts: Vec<u32>,
    /// What is not sound, in words.
    pub damage: Vec<String>,
    /// Whether the damage leaves open which record belongs to which batch.
    pub unusable: bool,
}

/// Why a file could not be examined at all.
#[derive(Debug, thiserror::Error)]
pub enum ExamineError {
    /// The file system says no.
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
    /// The header says no.
    #[error("{0}")]
    Header(#[from] HeaderError),
}

/// Reads the file and checks all of it.
///
/// # Errors
/// See [`ExamineError`]; damage behind a sound header is in the result.
pub fn examine(path: &Path) -> Result<Examined, ExamineError> {
    let file = File::open(path)?;
    let bytes = file.metadata()?.len() as usize;
    if bytes < RECORDS_AT {
        return Err(HeaderError::NotASegment.into());
    }
    let map = map_read(&file, bytes)?;
    let header = Header::decode(&map)?;
    let salt = header.salt();
    let mut damage = Vec::new();
    let mut read_cell = |at, name: &str| match cell(&map, at, salt) {
        Ok(value) => value,
        Err([value, check]) => {
            damage.push(format!(
                "the {name} cell is damaged ({value:#x}, {check:#x})"
            ));
            None
        }
    };
    let first_batch = read_cell(FIRST_BATCH_AT, "first-batch");
    let end_cell = read_cell(END_AT, "end");
    let sealed_records = read_cell(SEALED_AT, "sealed").filter(|&sealed| sealed > 0);
    let applied = read_cell(APPLIED_AT, "applied");

    let end = match end_cell {
        Some(end) if (RECORDS_AT as u64..=bytes as u64).contains(&end) && end % 16 == 0 => {
            Some(end as usize)
        }
        Some(end) => {
            damage.push(format!(
                "records end at {end}, outside of the file's {bytes} bytes"
            ));
            None
        }
        None => None,
    };
    let walk = walk(&map, end, header.batch_keys, salt, &mut damage);
    let mut examined = Examined {
        header,
        first_batch,
        sealed: sealed_records.is_some(),
        applied,
        end: end.unwrap_or(walk.end),
        records: walk.records,
        sum: walk.sum,
        batch_starts: walk.batch_starts,
        damage,
        unusable: false,
    };
    if let Some(records) = sealed_records {
        let records = records - 1;
        let batches = records.div_ceil(u64::from(header.batch_keys)) as usize;
        match table(&map, examined.end, batches, salt) {
            Some(starts) => examined.batch_starts = starts,
            None => examined
                .damage
                .push("the table of batches is damaged".to_owned()),
        }
        if u64::from(examined.records) != records {
            examined.damage.push(format!(
                "{records} records were sealed, {} of them are sound",
                examined.records
            ));
            examined.unusable = examined.batch_starts.len() != batches
                || table(&map, examined.end, batches, salt).is_none();
        }
    }
    Ok(examined)
}

struct Walk {
    records: u32,
    sum: i128,
    end: usize,
    batch_starts: Vec<u32>,
}

/// Walks the records up to `end`, or, when that is not known, as far as sound ones are found.
fn walk(
    bytes: &[u8],
    end: Option<usize>,
    batch_keys: u32,
    salt: u64,
    damage: &mut Vec<String>,
) -> Walk {
    let mut found = Walk {
        records: 0,
        sum: 0,
        end: RECORDS_AT,
        batch_starts: Vec::new(),
    };
    let limit = end.unwrap_or(bytes.len());
    let mut at = RECORDS_AT;
    let mut unsound_from = None;
    while at < limit {
        if let Some(record) = record(bytes, at, limit, salt) {
            if let Some(from) = unsound_from.take() {
                damage.push(format!("no sound record in bytes {from} to {at}"));
            }
            if found.records.is_multiple_of(batch_keys) {
                found.batch_starts.push((at / 16) as u32);
            }
            found.records += 1;
            found.sum += i128::from(record.delta);
            at = record.next;
            found.end = at;
        } else {
            // Records begin at multiples of 16: the next sound one is found whatever lies between.
            unsound_from.get_or_insert(at);
            at += 16;
        }
    }
    if let Some(from) = unsound_from
        && end.is_some()
    {
        damage.push(format!("no sound record in bytes {from} to {limit}"));
    }
    found
}

fn table(bytes: &[u8], end: usize, batches: usize, salt: u64) -> Option<Vec<u32>> {
    let table = bytes.get(end..end.checked_add(table_bytes(batches))?)?;
    let (starts, check) = table.split_at(batches * 4);
    (xxh3_64_with_seed(starts, salt) == format::u64_at(check, 0)).then(|| {
        (0..batches)
            .map(|i| format::u32_at(starts, i * 4))
            .collect()
    })
}
