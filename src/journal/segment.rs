//! One segment: open and written in place, or sealed and read.
//!
//! Invariants:
//! 1. Bytes below `end` are whole records; `end` moves only after the record below it is whole.
//! 2. Memory is touched only below `allocated`, which the file system has promised: a full disk is
//!    an error at opening or growing, never a SIGBUS.
//! 3. A sealed segment's records never change; its file gets no other writes than the `applied`
//!    cell.
//!
//! A write through the map is in the kernel's page cache at once: it survives the process without
//! any system call. Only a power cut needs [`Sealed::sync`] or [`SyncHandle::sync`].

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};

use memmap2::{Mmap, MmapMut, MmapOptions, RemapOptions};
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, fdatasync, ftruncate, memfd_create};
use rustix::io::retry_on_intr;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::format::{
    self, APPLIED_AT, DELTA_FACTOR, END_AT, FIRST_BATCH_AT, FIRST_BATCH_COPY_AT, HEADER_BYTES,
    Header, KEY_BYTES_MAX, RECORD_HEAD, RECORDS_AT, SEALED_AT, cell_check, record_bytes,
    record_check, record_seed,
};
use super::store16::store16;
use crate::counters::{RecordError, Recorder, prefetch};
use crate::fail_point::fail_point;
use crate::private;
use crate::store::Delta;

/// A new segment's size in bytes: room for some 30,000 short keys before it first grows.
pub const BYTES_INITIAL: usize = 1 << 20;

/// No more is made ready in advance, in bytes: an epoch that grew while the store was away is no
/// measure for the next.
const BYTES_EXPECTED_MAX: usize = 16 << 20;

/// The open segment. Lives on the ingest thread.
pub struct Writer {
    file: Arc<File>,
    path: PathBuf,
    map: MmapMut,
    header: Header,
    salt: u64,
    first_batch: u64,
    end: usize,
    /// No record may end beyond this, whatever the file could hold.
    bytes_max: usize,
    /// What a new segment has; with less it is cramped.
    bytes_initial: usize,
    records: u32,
    batch_starts: Vec<u32>,
    /// Of a segment taken up again: what its `applied` cell told.
    applied: u64,
    stuck: Stuck,
}

/// Whether a segment could not grow when it last had to; one that began without room counts as such.
#[derive(Debug, Clone)]
pub struct Stuck(Arc<AtomicU8>);

const GROWS: u8 = 0;
const HAS_RECORDS: u8 = 1;
const IS_EMPTY: u8 = 2;

impl Stuck {
    fn new(state: u8) -> Self {
        Self(Arc::new(AtomicU8::new(state)))
    }

    /// Whether it is so.
    pub fn get(&self) -> bool {
        self.0.load(Ordering::Relaxed) != GROWS
    }

    /// Whether it is so, and it has no record that could be flushed.
    pub fn is_empty(&self) -> bool {
        self.0.load(Ordering::Relaxed) == IS_EMPTY
    }

    fn set(&self, state: u8) {
        self.0.store(state, Ordering::Relaxed);
    }
}

impl Writer {
    /// Creates the segment's file and preallocates so many bytes of it, rounded up to whole pages.
    ///
    /// # Errors
    /// What the file system says; a partial file is removed again.
    pub fn create(
        path: &Path,
        header: Header,
        bytes_max: usize,
        bytes_initial: usize,
    ) -> io::Result<Self> {
        let file = private::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)?;
        let bytes = bytes_initial.max(RECORDS_AT).next_multiple_of(RECORDS_AT);
        Self::with_room(file, path, header, bytes_max, bytes, bytes).inspect_err(|_| {
            // What could not be preallocated holds nothing yet.
            let _ = std::fs::remove_file(path);
        })
    }

    /// Makes a segment of a file that has room for a header and holds no record. Where it has no room
    /// for more, it takes its first record when it can grow.
    ///
    /// # Errors
    /// What the file system says.
    pub(super) fn reuse(
        path: &Path,
        header: Header,
        bytes_max: usize,
        bytes_initial: usize,
    ) -> io::Result<Self> {
        let file = File::options().read(true).write(true).open(path)?;
        let bytes = (file.metadata()?.len() as usize).max(RECORDS_AT);
        Self::with_room(
            file,
            path,
            header,
            bytes_max,
            bytes.next_multiple_of(RECORDS_AT),
            bytes_initial,
        )
    }

    /// Makes a segment without a file: it takes no record.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn nowhere(
        path: &Path,
        header: Header,
        bytes_max: usize,
        bytes_initial: usize,
    ) -> io::Result<Self> {
        let file = File::from(memfd_create("tallyd", MemfdFlags::CLOEXEC)?);
        Self::with_room(file, path, header, bytes_max, RECORDS_AT, bytes_initial)
    }

    fn with_room(
        file: File,
        path: &Path,
        header: Header,
        bytes_max: usize,
        bytes: usize,
        bytes_initial: usize,
    ) -> io::Result<Self> {
        preallocate(&file, bytes)?;
        let mut map = map_mut(&file, bytes)?;
        map[..HEADER_BYTES].copy_from_slice(&header.encode());
        Ok(Writer {
            file: Arc::new(file),
            path: path.to_owned(),
            map,
            header,
            salt: header.salt(),
            first_batch: 0,
            end: RECORDS_AT,
            bytes_max,
            bytes_initial,
            records: 0,
            batch_starts: Vec::new(),
            applied: 0,
            stuck: Stuck::new(if bytes < bytes_initial {
                IS_EMPTY
            } else {
                GROWS
            }),
        })
    }

    /// Whether it has less room than a new segment is to have.
    pub fn is_cramped(&self) -> bool {
        self.map.len() < self.bytes_initial
    }

    /// Tells other threads whether it can grow.
    pub fn stuck(&self) -> Stuck {
        self.stuck.clone()
    }

    /// Makes room for so many bytes of records before they come, with the pages already there: what
    /// the last epoch needed, the next one is likely to need. Does file I/O: not for the ingest
    /// thread.
    ///
    /// # Errors
    /// What the file system says; the segment is as usable as before.
    pub fn expect(&mut self, bytes: usize) -> io::Result<()> {
        let bytes = (RECORDS_AT + bytes.min(BYTES_EXPECTED_MAX)).next_multiple_of(4096);
        if bytes > self.map.len() {
            preallocate(&self.file, bytes)?;
            self.map = map_populated(&self.file, bytes)?;
        }
        Ok(())
    }

    /// Takes up a segment that a process left open, or that was damaged, to seal it. Header and
    /// cells are written anew.
    pub(super) fn reopen(file: File, path: PathBuf, parts: SealedParts) -> io::Result<Self> {
        let needed = parts.end + table_bytes(parts.batch_starts.len());
        let bytes = (file.metadata()?.len() as usize)
            .max(needed)
            .next_multiple_of(4096);
        preallocate(&file, bytes)?;
        let mut writer = Writer {
            map: map_mut(&file, bytes)?,
            file: Arc::new(file),
            path,
            header: parts.header,
            salt: parts.header.salt(),
            first_batch: parts.first_batch,
            end: parts.end,
            bytes_max: 0,
            bytes_initial: 0,
            records: parts.records,
            batch_starts: parts.batch_starts,
            applied: parts.applied,
            stuck: Stuck::new(GROWS),
        };
        writer.map[..HEADER_BYTES].copy_from_slice(&parts.header.encode());
        if parts.applied >= parts.first_batch {
            writer.cell(APPLIED_AT, parts.applied);
        } else {
            store16(&mut writer.map, APPLIED_AT, 0, 0);
        }
        writer.begin(parts.first_batch);
        Ok(writer)
    }

    /// Makes this the open segment: from here on it takes records.
    pub fn begin(&mut self, first_batch: u64) {
        self.first_batch = first_batch;
        self.cell(FIRST_BATCH_COPY_AT, first_batch);
        self.cell(FIRST_BATCH_AT, first_batch);
        self.cell(END_AT, self.end as u64);
    }

    /// Its number.
    pub fn number(&self) -> u64 {
        self.header.number
    }

    /// Number of records.
    pub fn records(&self) -> u32 {
        self.records
    }

    /// Bytes of records.
    pub fn bytes(&self) -> usize {
        self.end - RECORDS_AT
    }

    /// The number that the next segment's first batch will have.
    pub fn next_first_batch(&self) -> u64 {
        self.first_batch + self.batch_starts.len() as u64
    }

    /// Bounds the bytes of records from now on.
    pub fn set_bytes_max(&mut self, bytes_max: usize) {
        self.bytes_max = bytes_max;
    }

    /// What another thread needs to make the records durable.
    pub fn sync_handle(&self) -> SyncHandle {
        SyncHandle(Arc::clone(&self.file))
    }

    /// Ends the epoch: marks the segment as sealed, writes the table of its batches and shrinks
    /// the file to what it holds. Does file I/O: not for the ingest thread.
    ///
    /// # Errors
    /// What the system says; the records are safe, and recovery seals the segment.
    pub fn seal(mut self) -> io::Result<Sealed> {
        let table = batch_table(&self.batch_starts, self.salt);
        let end = self.end;
        // `append` kept the room.
        self.map[end..end + table.len()].copy_from_slice(&table);
        fail_point("seal.table");
        fence(Ordering::Release);
        self.cell(SEALED_AT, 1 + u64::from(self.records));
        let bytes = (end + table.len()).next_multiple_of(4096);
        // The map is given up before the shortened file is mapped anew: nothing may touch the cut.
        drop(self.map);
        let map = map_read(&self.file, bytes)?;
        fail_point("seal.marked");
        retry_on_intr(|| ftruncate(&*self.file, bytes as u64))?;
        Ok(Sealed {
            file: Mutex::new(Some(self.file)),
            path: self.path,
            map,
            header: self.header,
            salt: self.salt,
            first_batch: self.first_batch,
            applied: AtomicU64::new(self.applied.max(self.first_batch - 1)),
            end,
            records: self.records,
            batch_starts: self.batch_starts,
        })
    }

    /// Removes a segment that never took a record.
    ///
    /// # Errors
    /// What the file system says.
    pub fn discard(self) -> io::Result<()> {
        std::fs::remove_file(&self.path)
    }

    fn cell(&mut self, at: usize, value: u64) {
        store16(&mut self.map, at, value, cell_check(self.salt, at, value));
    }

    #[cold]
    fn grow(&mut self, needed: usize) -> io::Result<()> {
        let bytes = (self.map.len() * 2).max(needed).next_multiple_of(4096);
        let room = preallocate(&self.file, bytes);
        self.stuck.set(match (&room, self.records) {
            (Ok(()), _) => GROWS,
            (Err(_), 0) => IS_EMPTY,
            (Err(_), _) => HAS_RECORDS,
        });
        room?;
        // SAFETY: as for `map_mut`. Moved rather than mapped anew, because pages that were touched
        // would each fault again (measured: 4 ns an increment over a million keys).
        #[allow(unsafe_code)]
        unsafe {
            self.map.remap(bytes, RemapOptions::new().may_move(true))?;
        }
        Ok(())
    }
}

impl Recorder for Writer {
    #[inline]
    fn epoch(&self) -> u32 {
        epoch(self.header.number)
    }

    fn append(&mut self, key: &[u8], amount: i64) -> Result<u32, RecordError> {
        debug_assert!(key.len() <= KEY_BYTES_MAX, "the edge refuses longer keys");
        let at = self.end;
        let end = at + record_bytes(key.len());
        if end - RECORDS_AT > self.bytes_max {
            return Err(RecordError::Limit);
        }
        // Sealing writes the table behind the records; its room is taken now, while "no" is an answer.
        let needed = end + table_bytes(self.batch_starts.len() + 1);
        if needed > self.map.len() && self.grow(needed).is_err() {
            return Err(RecordError::Disk);
        }
        let bytes = &mut self.map[at..end];
        bytes[16..RECORD_HEAD].copy_from_slice(&(key.len() as u32).to_le_bytes());
        bytes[RECORD_HEAD..RECORD_HEAD + key.len()].copy_from_slice(key);
        let check = record_check(record_seed(self.salt, at, key), amount);
        store16(&mut self.map, at, amount as u64, check);
        fail_point("append.written");
        // The record is whole before `end` says so.
        fence(Ordering::Release);
        self.end = end;
        self.cell(END_AT, end as u64);
        if self.records.is_multiple_of(self.header.batch_keys) {
            self.batch_starts.push((at / 16) as u32);
        }
        self.records += 1;
        Ok((at / 16) as u32)
    }

    #[inline]
    fn add(&mut self, record: u32, amount: i64) -> Result<(), RecordError> {
        let at = record as usize * 16;
        let delta = format::u64_at(&self.map, at) as i64;
        let Some(sum) = delta.checked_add(amount) else {
            return Err(RecordError::Overflow);
        };
        let check = format::u64_at(&self.map, at + 8)
            .wrapping_add(DELTA_FACTOR.wrapping_mul(amount as u64));
        store16(&mut self.map, at, sum as u64, check);
        Ok(())
    }

    #[inline]
    fn delta(&self, record: u32) -> i64 {
        format::u64_at(&self.map, record as usize * 16) as i64
    }

    #[inline]
    fn prefetch(&self, record: u32) {
        if let Some(line) = self.map.get(record as usize * 16) {
            prefetch(line);
        }
    }
}

/// Makes what is in the open segment durable, from another thread.
#[derive(Clone)]
pub struct SyncHandle(Arc<File>);

impl SyncHandle {
    /// Waits until everything written so far would survive a power cut.
    ///
    /// # Errors
    /// What the system says; nothing younger than the last success is durable then.
    pub fn sync(&self) -> io::Result<()> {
        Ok(retry_on_intr(|| fdatasync(&*self.0))?)
    }
}

/// An immutable segment: a list of batches.
pub struct Sealed {
    /// Until it is kept; `None` as well for one that was opened again. A map needs none.
    file: Mutex<Option<Arc<File>>>,
    path: PathBuf,
    map: Mmap,
    header: Header,
    salt: u64,
    first_batch: u64,
    applied: AtomicU64,
    end: usize,
    records: u32,
    batch_starts: Vec<u32>,
}

impl Sealed {
    /// Of parts that recovery has read and checked.
    pub(super) fn from_parts(path: PathBuf, map: Mmap, parts: SealedParts) -> Self {
        Sealed {
            file: Mutex::new(None),
            path,
            map,
            salt: parts.header.salt(),
            header: parts.header,
            first_batch: parts.first_batch,
            applied: AtomicU64::new(parts.applied),
            end: parts.end,
            records: parts.records,
            batch_starts: parts.batch_starts,
        }
    }

    /// Its number.
    pub fn number(&self) -> u64 {
        self.header.number
    }

    /// Number of records.
    pub fn records(&self) -> u32 {
        self.records
    }

    /// Bytes of records.
    pub fn bytes(&self) -> usize {
        self.end - RECORDS_AT
    }

    /// Its file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// As [`Recorder::epoch`] told it while it was open.
    pub fn epoch(&self) -> u32 {
        epoch(self.header.number)
    }

    /// Where the records of this batch end, as [`Recorder::append`] tells places.
    pub fn batch_end(&self, number: u64) -> u32 {
        let index = number.wrapping_sub(self.first_batch) as usize;
        let next = self.batch_starts.get(index + 1);
        next.copied().unwrap_or((self.end / 16) as u32)
    }

    /// Number of its first batch.
    pub fn first_batch(&self) -> u64 {
        self.first_batch
    }

    /// Number of its last batch; one less than the first when it has none.
    pub fn last_batch(&self) -> u64 {
        self.first_batch + self.batch_starts.len() as u64 - 1
    }

    /// Last batch known to be in the store; one less than the first for none.
    pub fn applied(&self) -> u64 {
        self.applied.load(Ordering::Relaxed)
    }

    /// Notes that the store has everything up to `batch`.
    ///
    /// Not synced: after a power cut the token tells more than this cell, never less.
    ///
    /// # Errors
    /// What the file system says.
    pub fn set_applied(&self, batch: u64) -> io::Result<()> {
        self.applied.store(batch, Ordering::Relaxed);
        let mut cell = [0; 16];
        cell[..8].copy_from_slice(&batch.to_le_bytes());
        cell[8..].copy_from_slice(&cell_check(self.salt, APPLIED_AT, batch).to_le_bytes());
        self.file()?.write_all_at(&cell, APPLIED_AT as u64)
    }

    /// Its file, for a moment.
    fn file(&self) -> io::Result<Arc<File>> {
        let open = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        match &*open {
            Some(file) => Ok(Arc::clone(file)),
            None => Ok(Arc::new(File::options().write(true).open(&self.path)?)),
        }
    }

    /// What is needed to open it again. Its descriptor is given up now, its map with the last who holds
    /// it.
    pub fn keep(&self) -> Kept {
        let mut open = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        *open = None;
        Kept {
            path: self.path.clone(),
            parts: SealedParts {
                header: self.header,
                first_batch: self.first_batch,
                applied: self.applied(),
                end: self.end,
                records: self.records,
                batch_starts: self.batch_starts.clone(),
            },
        }
    }

    /// The deltas of one batch, in their order; empty when its records were damaged.
    pub fn batch(&self, number: u64) -> impl Iterator<Item = Delta<'_>> {
        let index = number.wrapping_sub(self.first_batch) as usize;
        let start = |i: usize| self.batch_starts.get(i).map(|&at| at as usize * 16);
        let mut at = start(index).unwrap_or(self.end);
        let end = start(index + 1).unwrap_or(self.end);
        std::iter::from_fn(move || {
            while at < end {
                if let Some(record) = format::record(&self.map, at, end, self.salt) {
                    at = record.next;
                    return Some(Delta {
                        key: record.key,
                        amount: record.delta,
                    });
                }
                at += 16; // Damaged, and reported when it was recovered: look for the next sound one.
            }
            None
        })
    }

    /// Every delta, in the order of the batches.
    pub fn deltas(&self) -> impl Iterator<Item = Delta<'_>> {
        (self.first_batch..=self.last_batch()).flat_map(|number| self.batch(number))
    }

    /// Waits until the segment would survive a power cut.
    ///
    /// # Errors
    /// What the system says.
    pub fn sync(&self) -> io::Result<()> {
        let file = self.file()?;
        Ok(retry_on_intr(|| fdatasync(&*file))?)
    }
}

/// A sealed segment that only waits, neither open nor mapped: all of it is in the store, and may have
/// to be sent again.
pub struct Kept {
    path: PathBuf,
    parts: SealedParts,
}

impl Kept {
    /// Its file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Number of its first batch.
    pub fn first_batch(&self) -> u64 {
        self.parts.first_batch
    }

    /// Number of its last batch.
    pub fn last_batch(&self) -> u64 {
        self.parts.last_batch()
    }

    /// Bytes of records.
    pub fn bytes(&self) -> usize {
        self.parts.end - RECORDS_AT
    }

    /// Bytes that the file takes.
    pub fn file_bytes(&self) -> usize {
        self.parts.file_bytes()
    }

    /// Opens it again.
    ///
    /// # Errors
    /// What the file system says; `InvalidData`: it is not the file that it was.
    pub fn open(&self) -> io::Result<Sealed> {
        let file = File::open(&self.path)?;
        let bytes = self.parts.file_bytes();
        let is_long_enough = file.metadata()?.len() >= bytes as u64;
        // What lies beyond a file's end must not be touched.
        let map = if is_long_enough {
            map_read(&file, bytes)?
        } else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        if !map.starts_with(&self.parts.header.encode()) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(Sealed::from_parts(
            self.path.clone(),
            map,
            self.parts.clone(),
        ))
    }

    /// Removes the file. One that is not there needs no removing.
    ///
    /// # Errors
    /// What the file system says.
    pub fn remove(&self) -> io::Result<()> {
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed,
        }
    }
}

/// Room for so many bytes, promised by the file system. A process that is stopped for a moment (by a
/// signal, by a freezer) finds the call interrupted, which is no "no".
pub(super) fn preallocate(file: &File, bytes: usize) -> io::Result<()> {
    let promise = || fallocate(file, FallocateFlags::empty(), 0, bytes as u64);
    Ok(retry_on_intr(promise)?)
}

/// 0 is "none"; numbers begin at 1 and two live epochs are never 2^32 apart.
fn epoch(number: u64) -> u32 {
    number as u32 | u32::from(number as u32 == 0)
}

/// What is known of a sealed segment, besides its place and its bytes.
#[derive(Clone)]
pub(super) struct SealedParts {
    pub header: Header,
    pub first_batch: u64,
    pub applied: u64,
    pub end: usize,
    pub records: u32,
    pub batch_starts: Vec<u32>,
}

impl SealedParts {
    fn last_batch(&self) -> u64 {
        self.first_batch + self.batch_starts.len() as u64 - 1
    }

    fn file_bytes(&self) -> usize {
        (self.end + table_bytes(self.batch_starts.len())).next_multiple_of(4096)
    }
}

/// The table that follows the records of a sealed segment.
pub(super) fn batch_table(starts: &[u32], salt: u64) -> Vec<u8> {
    let mut table: Vec<u8> = starts
        .iter()
        .flat_map(|start| start.to_le_bytes())
        .collect();
    let check = xxh3_64_with_seed(&table, salt);
    table.extend_from_slice(&check.to_le_bytes());
    table
}

/// Bytes of the table of so many batches.
pub(super) fn table_bytes(batches: usize) -> usize {
    batches * 4 + 8
}

#[allow(unsafe_code)]
pub(super) fn map_mut(file: &File, bytes: usize) -> io::Result<MmapMut> {
    // SAFETY: the file is ours alone (the directory is locked), is at least `bytes` long by
    // `fallocate`, and is shortened only after this map is gone.
    unsafe { MmapOptions::new().len(bytes).map_mut(file) }
}

#[allow(unsafe_code)]
fn map_populated(file: &File, bytes: usize) -> io::Result<MmapMut> {
    // SAFETY: as for `map_mut`.
    unsafe { MmapOptions::new().len(bytes).populate().map_mut(file) }
}

#[allow(unsafe_code)]
pub(super) fn map_read(file: &File, bytes: usize) -> io::Result<Mmap> {
    // SAFETY: as for `map_mut`; the `applied` cell, which changes, is never read through it.
    unsafe { MmapOptions::new().len(bytes).map(file) }
}
