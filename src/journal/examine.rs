//! Reads a segment file as it lies on the disk, sound or not, and changes nothing.
//!
//! Used by recovery, under the directory's lock, and by `tallyd journal`, beside a running daemon.
//!
//! Invariants:
//! 1. A record is reported only if its own check passes, whatever else is damaged.
//! 2. Where a batch begins is told only if that is certain: by the table, or by counting records
//!    among which none is missing. Batches of a segment that was never sealed were never sent, so
//!    there any grouping will do.
//! 3. Time is linear in the file's size, whatever it holds.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::time::Duration;

use xxhash_rust::xxh3::Xxh3;

use super::format::{
    self, APPLIED_AT, END_AT, FIRST_BATCH_AT, FIRST_BATCH_COPY_AT, HEADER_BYTES, Header,
    HeaderError, MAGIC, RECORDS_AT, SEALED_AT, cell, record,
};
use super::segment::{map_read, table_bytes};
use crate::store::NodeId;

/// Batch numbers stay far below: a cell that says otherwise is wrong, check or not.
const BATCH_MAX: u64 = 1 << 63;
/// More than `flush.max_keys` allows.
const BATCHES_MAX: u64 = 1 << 27;
/// How often a file that another process writes to is read again before damage is believed.
const READS_MAX: u32 = 10;
/// Between two such reads.
const READ_PAUSE: Duration = Duration::from_millis(2);

/// What is known of a segment without reading it. A damaged header is rebuilt from it.
#[derive(Debug, Clone, Copy)]
pub struct Expected {
    /// The node of the directory.
    pub node: NodeId,
    /// The number in the file's name.
    pub number: u64,
    /// Records a batch, as configured.
    pub batch_keys: u32,
}

/// What a segment file holds.
#[derive(Debug)]
pub struct Examined {
    /// Its header.
    pub header: Header,
    /// Number of its first batch; `None`: it never became the open segment, or damage took it.
    pub first_batch: Option<u64>,
    /// Whether it was sealed, or may have been.
    pub sealed: bool,
    /// Last batch known to be in the store.
    pub applied: Option<u64>,
    /// Where its records end.
    pub end: usize,
    /// Sound records.
    pub records: u32,
    /// Records when it was sealed.
    pub records_sealed: Option<u64>,
    /// Sum of the sound records' deltas (wider than any of them).
    pub sum: i128,
    /// Where each batch begins, in 16-byte units. Batches whose records are lost are there, empty.
    pub batch_starts: Vec<u32>,
    /// What is not sound, in words.
    pub damage: Vec<String>,
    /// Whether the damage leaves open which record belongs to which batch.
    pub unusable: bool,
    /// Whether the damage leaves open how many batches there were.
    pub batches_lost: bool,
}

impl Examined {
    /// Number of its last batch (one less than the first for none), if its first is `first_batch`.
    pub fn last_batch(&self, first_batch: u64) -> u64 {
        first_batch + self.batch_starts.len() as u64 - 1
    }

    /// Whether it is the standby, or an epoch in which nothing happened.
    pub fn is_empty(&self) -> bool {
        self.records == 0 && self.batch_starts.is_empty() && self.damage.is_empty()
    }
}

/// Why a file holds nothing to go by.
#[derive(Debug, thiserror::Error)]
pub enum ExamineError {
    /// The file system says no.
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
    /// The header says no, and nothing behind it is sound.
    #[error("{0}")]
    Header(#[from] HeaderError),
    /// Created, never written: its process ended first.
    #[error("never written")]
    Blank,
}

/// Reads the file and checks all of it. The caller holds the directory's lock.
///
/// # Errors
/// See [`ExamineError`]; damage behind a sound header is in the result.
pub fn examine(path: &Path, expected: Expected) -> Result<Examined, ExamineError> {
    let file = File::open(path)?;
    let bytes = file.metadata()?.len() as usize;
    if bytes < RECORDS_AT {
        return examine_bytes(&fs::read(path)?, expected);
    }
    examine_bytes(&map_read(&file, bytes)?, expected)
}

/// The same beside a running daemon. The file is read, never mapped: the daemon may shorten it. What a
/// read tears while the daemon writes is sound in one of the next reads; what stays is damage.
///
/// # Errors
/// As for [`examine`].
pub fn examine_live(path: &Path, expected: Expected) -> Result<Examined, ExamineError> {
    let mut damage: Option<Vec<String>> = None;
    for read in 1.. {
        let mut found = examine_bytes(&fs::read(path)?, expected)?;
        let lasting = match damage.take() {
            None => found.damage.clone(),
            Some(mut lasting) => {
                lasting.retain(|words| found.damage.contains(words));
                lasting
            }
        };
        if lasting.is_empty() || read == READS_MAX {
            found.unusable &= !lasting.is_empty();
            found.damage = lasting;
            return Ok(found);
        }
        damage = Some(lasting);
        std::thread::sleep(READ_PAUSE);
    }
    unreachable!("the last read returns")
}

/// Checks all of a segment's bytes.
///
/// # Errors
/// See [`ExamineError`].
pub fn examine_bytes(bytes: &[u8], expected: Expected) -> Result<Examined, ExamineError> {
    if bytes.len() < RECORDS_AT {
        // Cut off within the header page: what is left of it may still tell the batch number.
        let mut padded = bytes.to_vec();
        padded.resize(RECORDS_AT, 0);
        return examine_whole(&padded, bytes.len(), expected);
    }
    examine_whole(bytes, bytes.len(), expected)
}

fn examine_whole(
    bytes: &[u8],
    file_bytes: usize,
    expected: Expected,
) -> Result<Examined, ExamineError> {
    let mut damage = Vec::new();
    let (header, batch_keys_known, refusal) = match Header::decode(bytes) {
        Ok(header) => (header, true, None),
        Err(error @ HeaderError::Format(_)) => return Err(error.into()),
        Err(_) if is_blank(bytes, file_bytes) => return Err(ExamineError::Blank),
        Err(error) => {
            let (node, number) = (expected.node, expected.number);
            let (header, known) = Header::rebuild(bytes, node, number, expected.batch_keys);
            damage.push(error.to_string());
            (header, known, Some(error))
        }
    };
    let salt = header.salt();
    let cells = Cells::read(bytes, file_bytes, salt, &mut damage);
    let walk = walk(bytes, cells.end, header.batch_keys, salt, &mut damage);
    if let Some(error) = refusal
        && walk.records == 0
        && cells.first_batch.is_none()
        && cells.end.is_none()
    {
        // Nothing confirms that the rebuilt header is the right one.
        return Err(error.into());
    }
    let mut examined = Examined {
        header,
        first_batch: cells.first_batch,
        sealed: cells.sealed_records.is_some() || cells.sealed_damaged,
        applied: cells.applied,
        end: cells.end.unwrap_or(walk.end),
        records: walk.records,
        records_sealed: cells.sealed_records,
        sum: walk.sum,
        batch_starts: walk.batch_starts,
        damage,
        unusable: false,
        batches_lost: false,
    };
    if cells.end.is_none() && !cells.end_damaged && examined.records > 0 {
        let words = "the end cell is empty, and there are records";
        examined.damage.push(words.to_owned());
    }
    if cells.first_batch.is_none()
        && !cells.first_batch_damaged
        && (examined.records > 0 || cells.end.is_some() || examined.sealed)
    {
        let words = "the first-batch cell is empty, and the segment was opened";
        examined.damage.push(words.to_owned());
    }
    let table = find_table(bytes, examined.end, salt);
    if let Some(starts) = table {
        // Also behind a segment whose process ended between the table and the sealed cell.
        examined.batch_starts = starts;
    } else if examined.sealed {
        let words = "the table of batches is damaged";
        examined.damage.push(words.to_owned());
        examined.unusable = walk.hole || !batch_keys_known;
        let all_there = cells.end == Some(walk.end) && !walk.hole && batch_keys_known;
        examined.batches_lost = cells.sealed_records.is_none() && !all_there;
        let batches = cells
            .sealed_records
            .map_or(0, |records| records.div_ceil(header.batch_keys.into()));
        // What was lost at the end keeps its numbers.
        let batches = batches.min(BATCHES_MAX) as usize;
        if examined.batch_starts.len() < batches {
            let end = (examined.end / 16) as u32;
            examined.batch_starts.resize(batches, end);
        }
    }
    if let Some(records) = cells.sealed_records
        && u64::from(examined.records) != records
    {
        examined.damage.push(format!(
            "{records} records were sealed, {} of them are sound",
            examined.records
        ));
    }
    Ok(examined)
}

/// Whether a process ended between creating the file and finishing its header: the file is empty,
/// or preallocated and no byte behind the header was ever written.
fn is_blank(bytes: &[u8], file_bytes: usize) -> bool {
    if (1..RECORDS_AT).contains(&file_bytes) {
        return false;
    }
    bytes[HEADER_BYTES..].iter().all(|&byte| byte == 0)
        && bytes
            .iter()
            .zip(MAGIC)
            .all(|(byte, magic)| *byte == 0 || byte == magic)
}

struct Cells {
    first_batch: Option<u64>,
    first_batch_damaged: bool,
    end: Option<usize>,
    end_damaged: bool,
    /// Without the 1 that tells "sealed, no record" from "open".
    sealed_records: Option<u64>,
    sealed_damaged: bool,
    applied: Option<u64>,
}

impl Cells {
    fn read(bytes: &[u8], file_bytes: usize, salt: u64, damage: &mut Vec<String>) -> Self {
        let mut read = |at, name: &str| match cell(bytes, at, salt) {
            Ok(value) => (value, false),
            Err([value, check]) => {
                damage.push(format!(
                    "the {name} cell is damaged ({value:#x}, {check:#x})"
                ));
                (None, true)
            }
        };
        let (first, first_damaged) = read(FIRST_BATCH_AT, "first-batch");
        let (copy, copy_damaged) = read(FIRST_BATCH_COPY_AT, "second first-batch");
        let (end, mut end_damaged) = read(END_AT, "end");
        let (sealed, sealed_damaged) = read(SEALED_AT, "sealed");
        let (applied, _) = read(APPLIED_AT, "applied");
        let sealed_damaged = sealed_damaged || file_bytes < SEALED_AT + 16;
        let first_batch = first
            .or(copy)
            .filter(|first| (1..BATCH_MAX).contains(first));
        let end = end.and_then(|end| {
            let within = (RECORDS_AT as u64..=file_bytes as u64).contains(&end) && end % 16 == 0;
            if !within {
                end_damaged = true;
                damage.push(format!(
                    "records end at {end}, outside of the file's {file_bytes} bytes"
                ));
            }
            within.then_some(end as usize)
        });
        Cells {
            first_batch,
            first_batch_damaged: first_damaged || copy_damaged,
            end,
            end_damaged,
            sealed_records: sealed.and_then(|sealed| sealed.checked_sub(1)),
            sealed_damaged,
            applied,
        }
    }
}

struct Walk {
    records: u32,
    sum: i128,
    end: usize,
    batch_starts: Vec<u32>,
    /// Whether a sound record lies behind bytes that are none.
    hole: bool,
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
        hole: false,
    };
    let limit = end.unwrap_or(bytes.len());
    let mut at = RECORDS_AT;
    let mut unsound_from = None;
    while at < limit {
        if let Some(record) = record(bytes, at, limit, salt) {
            if let Some(from) = unsound_from.take() {
                damage.push(format!("no sound record in bytes {from} to {at}"));
                found.hole = true;
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

/// The table of batches behind the records, of whatever length its check confirms.
fn find_table(bytes: &[u8], end: usize, salt: u64) -> Option<Vec<u32>> {
    let end_unit = (end / 16) as u32;
    let mut starts: Vec<u32> = Vec::new();
    let mut hash = Xxh3::with_seed(salt);
    loop {
        let at = end + starts.len() * 4;
        if at + table_bytes(0) > bytes.len() {
            return None;
        }
        if hash.digest() == format::u64_at(bytes, at) {
            return Some(starts);
        }
        // Batches follow one another among the records, so what else lies here ends the search.
        let start = format::u32_at(bytes, at);
        let from = starts.last().copied().unwrap_or(RECORDS_AT as u32 / 16);
        if !(from..=end_unit).contains(&start) {
            return None;
        }
        hash.update(&start.to_le_bytes());
        starts.push(start);
    }
}
