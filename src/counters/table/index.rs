//! Where the entries are: the index over them, room for new ones, and who is given up for it.

use std::hash::{BuildHasher, Hasher};

use super::super::entry::{Entry, TAKEN, USED};
use super::super::huge::prefer_large_pages;
use super::super::op::NONE;
use super::{SEARCH_EVERY, SWEEP, Table};

impl Table {
    #[inline]
    pub(super) fn tag(&self, key: &[u8]) -> u32 {
        let mut hasher = self.hasher.build_hasher();
        hasher.write(key);
        hasher.finish() as u32
    }

    /// The first entry on the probe path whose hash agrees; its key is not looked at.
    #[inline]
    pub(super) fn candidate(&self, tag: u32) -> u32 {
        let mask = self.slots.len() - 1;
        let mut at = tag as usize & mask;
        loop {
            let slot = self.slots[at];
            if slot == 0 {
                return NONE;
            }
            if (slot >> 32) as u32 == tag {
                return slot as u32 - 1;
            }
            at = (at + 1) & mask;
        }
    }

    pub(super) fn find(&self, key: &[u8], tag: u32) -> u32 {
        let mask = self.slots.len() - 1;
        let mut at = tag as usize & mask;
        loop {
            let slot = self.slots[at];
            if slot == 0 {
                return NONE;
            }
            let entry = (slot as u32).wrapping_sub(1);
            if (slot >> 32) as u32 == tag && self.entries[entry as usize].holds(key, &self.long) {
                return entry;
            }
            at = (at + 1) & mask;
        }
    }

    /// Brings in a key that is not there.
    pub(super) fn insert(&mut self, key: &[u8], tag: u32) -> u32 {
        if (self.taken + 1) * 4 > self.slots.len() * 3 {
            self.grow_index();
        }
        let entry = Entry::new(key, &mut self.long);
        let number = if let Some(number) = self.free.pop() {
            self.entries[number as usize] = entry;
            number
        } else {
            self.entries.push(entry);
            (self.entries.len() - 1) as u32
        };
        place(
            &mut self.slots,
            u64::from(tag) << 32 | u64::from(number + 1),
        );
        self.taken += 1;
        number
    }

    pub(super) fn grow_index(&mut self) {
        let mut slots = vec![0; self.slots.len() * 2];
        prefer_large_pages(&mut slots);
        for &slot in self.slots.iter().filter(|&&slot| slot != 0) {
            place(&mut slots, slot);
        }
        self.slots = slots;
    }

    /// Gives up entries, where the limit asks for it, before a key is brought in that takes `bytes`.
    /// Returns whether any was given up.
    pub(super) fn make_room(&mut self, bytes: usize) -> bool {
        if self.bytes() + bytes <= self.limits.bytes_max {
            return false;
        }
        if self.search_in > 0 {
            self.search_in -= 1;
            return false;
        }
        let any = self.evict(bytes);
        if self.bytes() + bytes > self.limits.bytes_max {
            // All that was looked at has something pending; so has what is looked at next, probably.
            self.search_in = SEARCH_EVERY;
        }
        any
    }

    /// Gives up some of what is held beyond the limit with nothing pending; `false`: there is none of
    /// it, as far as this search went.
    pub fn trim(&mut self) -> bool {
        self.bytes() > self.limits.bytes_max && self.evict(0)
    }

    /// Gives up entries that hold nothing pending until there is room for `bytes` more, or the
    /// search has gone far enough. Returns whether any was given up.
    pub(super) fn evict(&mut self, bytes: usize) -> bool {
        let before = self.evicted;
        let from = self.hand;
        self.sweep(bytes);
        if self.bytes() + bytes > self.limits.bytes_max {
            // Over the same entries again, whose bits of recent use are cleared by now: better to
            // give up one that is used than to hold more than there may be.
            self.hand = from;
            self.sweep(bytes);
        }
        self.evicted != before
    }

    pub(super) fn sweep(&mut self, bytes: usize) {
        for _ in 0..SWEEP.min(self.entries.len()) {
            if self.bytes() + bytes <= self.limits.bytes_max {
                break;
            }
            self.hand = (self.hand + 1) % self.entries.len();
            let entry = &mut self.entries[self.hand];
            if !entry.has(TAKEN) || entry.pending != 0 {
                continue;
            }
            if entry.has(USED) {
                entry.flags &= !USED;
                continue;
            }
            self.remove(self.hand as u32);
            self.evicted += 1;
        }
    }

    pub(super) fn remove(&mut self, number: u32) {
        let mask = self.slots.len() - 1;
        let tag = self.tag(self.entries[number as usize].key(&self.long));
        let mut hole = tag as usize & mask;
        while self.slots[hole] as u32 != number + 1 {
            hole = (hole + 1) & mask;
        }
        // Close the hole: move back each follower whose own place is at or before it.
        let mut next = (hole + 1) & mask;
        while self.slots[next] != 0 {
            let start = (self.slots[next] >> 32) as usize & mask;
            if next.wrapping_sub(start) & mask >= next.wrapping_sub(hole) & mask {
                self.slots[hole] = self.slots[next];
                hole = next;
            }
            next = (next + 1) & mask;
        }
        self.slots[hole] = 0;
        let pending = self.entries[number as usize].pending;
        self.pending_sum = self.pending_sum.wrapping_sub(pending);
        self.entries[number as usize].free(&mut self.long);
        self.free.push(number);
        self.taken -= 1;
    }
}

fn place(slots: &mut [u64], slot: u64) {
    let mask = slots.len() - 1;
    let mut at = (slot >> 32) as usize & mask;
    while slots[at] != 0 {
        at = (at + 1) & mask;
    }
    slots[at] = slot;
}
