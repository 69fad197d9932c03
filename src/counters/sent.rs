//! How far the sealed epoch has been sent: which of its deltas a value read from the store may contain.

/// The records that may be in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sent(u64);

impl Sent {
    /// Any record of any epoch.
    pub const ANY: Sent = Sent(u64::MAX);

    /// Of this epoch those before this record, of later epochs none.
    pub fn before(epoch: u32, record: u32) -> Self {
        Sent(u64::from(epoch) << 32 | u64::from(record))
    }

    /// Whether this record may be in the store. Epoch 0 is none in particular.
    pub fn may_have(self, epoch: u32, record: u32) -> bool {
        let (sealed, end) = ((self.0 >> 32) as u32, self.0 as u32);
        // Epochs wrap around, after years.
        let later = epoch.wrapping_sub(sealed) as i32;
        self == Self::ANY || epoch == 0 || later < 0 || (later == 0 && record < end)
    }

    /// For an atomic.
    pub fn bits(self) -> u64 {
        self.0
    }

    /// From an atomic.
    pub fn from_bits(bits: u64) -> Self {
        Sent(bits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_sent_cannot_be_in_the_store() {
        let sent = Sent::before(7, 100);
        assert!(sent.may_have(7, 99));
        assert!(!sent.may_have(7, 100));
        assert!(sent.may_have(6, 5000), "an earlier epoch");
        assert!(!sent.may_have(8, 1), "a later one");
        assert!(sent.may_have(0, 5000));
        let last = Sent::before(u32::MAX, 100);
        assert!(!last.may_have(1, 1), "numbers wrap around");
        assert!(last.may_have(u32::MAX - 1, 1000));
        assert!(Sent::ANY.may_have(9, u32::MAX));
        assert_eq!(Sent::from_bits(sent.bits()), sent);
    }
}
