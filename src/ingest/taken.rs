//! Counting a group's increments by command, for a few instructions each.

/// By which command an increment came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Verb {
    /// `INCR`
    Incr,
    /// `INCRBY`
    IncrBy,
    /// `DECR`
    Decr,
    /// `DECRBY`
    DecrBy,
}

/// Bits of a lane.
const LANE: u32 = 16;
/// Increments that a lane can hold.
pub const LANE_MAX: usize = u16::MAX as usize;

/// The increments of at most [`LANE_MAX`] operations, a lane of one word for each command: adding
/// is a shift and an addition, without a branch or a write to memory.
#[derive(Debug, Clone, Copy, Default)]
pub struct Lanes(u64);

impl Lanes {
    /// Counts an increment that came by the command with this number, if it was taken.
    #[inline]
    pub fn add(&mut self, by: u8, taken: bool) {
        self.0 += u64::from(taken) << (u32::from(by % 4) * LANE);
    }

    /// How many came by this command.
    pub fn get(self, by: Verb) -> u64 {
        self.0 >> (by as u32 * LANE) & LANE_MAX as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_do_not_touch_each_other() {
        let mut lanes = Lanes::default();
        for _ in 0..LANE_MAX {
            lanes.add(Verb::Incr as u8, true);
            lanes.add(Verb::DecrBy as u8, true);
            lanes.add(Verb::IncrBy as u8, false);
        }
        lanes.add(Verb::Decr as u8, true);
        let counts = [Verb::Incr, Verb::IncrBy, Verb::Decr, Verb::DecrBy].map(|by| lanes.get(by));
        assert_eq!(counts, [LANE_MAX as u64, 0, 1, LANE_MAX as u64]);
    }
}
