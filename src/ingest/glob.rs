//! Redis' glob patterns: `*`, `?`, `[a-c]`, `[^x]`, and `\` before a character that means itself.
//!
//! Compiled once and matched in one pass over the text: all places of the pattern that the text may have
//! come to are bits of a few words, and each byte moves all of them at once (Shift-And: Baeza-Yates and
//! Gonnet, 1992, with a loop where a star is). So no pattern takes longer than another of its length.

/// A pattern with stars or classes inside may have so many elements beside the stars; one that only
/// says how a text begins may be longer.
pub const ELEMENTS_MAX: usize = 255;
/// What any pattern may have, in bytes.
pub const PATTERN_BYTES_MAX: usize = 4096;

const WORDS_MAX: usize = (ELEMENTS_MAX + 64) / 64;

/// A pattern that is too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "a pattern may have {PATTERN_BYTES_MAX} bytes, and {ELEMENTS_MAX} characters unless it is a beginning and a star"
)]
pub struct TooLong;

/// See the module's documentation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Glob(Kind);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    Exact(Box<[u8]>),
    Prefix(Box<[u8]>),
    Places(Places),
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Places {
    /// Of a set of places.
    words: usize,
    /// For each byte the places whose element takes it.
    takes: Vec<u64>,
    /// The places at which a star is.
    stars: [u64; WORDS_MAX],
    /// The place behind the last element.
    end: usize,
}

impl Glob {
    /// Compiles a pattern.
    ///
    /// # Errors
    /// It is too long.
    pub fn new(pattern: &[u8]) -> Result<Self, TooLong> {
        if pattern.len() > PATTERN_BYTES_MAX {
            return Err(TooLong);
        }
        let special = |text: &[u8]| text.iter().any(|byte| b"*?[\\".contains(byte));
        Ok(Self(match pattern.strip_suffix(b"*") {
            Some(prefix) if !special(prefix) => Kind::Prefix(prefix.into()),
            None if !special(pattern) => Kind::Exact(pattern.into()),
            _ => Kind::Places(Places::new(pattern)?),
        }))
    }

    /// Whether the whole text is as the pattern says.
    #[inline]
    pub fn matches(&self, text: &[u8]) -> bool {
        match &self.0 {
            Kind::Exact(exact) => **exact == *text,
            Kind::Prefix(prefix) => text.starts_with(prefix),
            Kind::Places(places) => places.matches(text),
        }
    }

    /// What it takes to match a text of so many bytes, in steps of a few nanoseconds.
    pub fn steps(&self, text_bytes: usize) -> usize {
        match &self.0 {
            Kind::Exact(_) | Kind::Prefix(_) => 1,
            Kind::Places(places) => places.words * text_bytes,
        }
    }

    /// The memory that it takes, in bytes.
    pub fn bytes(&self) -> usize {
        size_of::<Self>()
            + match &self.0 {
                Kind::Exact(text) | Kind::Prefix(text) => text.len(),
                Kind::Places(places) => places.takes.len() * 8,
            }
    }
}

impl Places {
    fn new(pattern: &[u8]) -> Result<Self, TooLong> {
        let mut elements = Vec::new();
        let mut stars = [0; WORDS_MAX];
        let mut rest = pattern;
        while let Some((&first, _)) = rest.split_first() {
            if first == b'*' {
                stars[elements.len() / 64] |= 1 << (elements.len() % 64);
                rest = &rest[1..];
                continue;
            }
            if elements.len() == ELEMENTS_MAX {
                return Err(TooLong);
            }
            let (element, used) = element(rest);
            elements.push(element);
            rest = &rest[used..];
        }
        let end = elements.len();
        let words = end / 64 + 1;
        let mut takes = vec![0; 256 * words];
        for (place, element) in elements.iter().enumerate() {
            for (byte, _) in element.iter().enumerate().filter(|(_, takes)| **takes) {
                takes[byte * words + place / 64] |= 1 << (place % 64);
            }
        }
        Ok(Self {
            words,
            takes,
            stars,
            end,
        })
    }

    fn matches(&self, text: &[u8]) -> bool {
        let mut at = [0_u64; WORDS_MAX];
        at[0] = 1;
        for &byte in text {
            let takes = &self.takes[usize::from(byte) * self.words..][..self.words];
            let (mut carry, mut any) = (0, 0);
            for ((at, takes), stars) in at.iter_mut().zip(takes).zip(self.stars) {
                let taken = *at & takes;
                *at = taken << 1 | carry | *at & stars;
                carry = taken >> 63;
                any |= *at;
            }
            if any == 0 {
                return false;
            }
        }
        at[self.end / 64] >> (self.end % 64) & 1 == 1
    }
}

/// Which bytes the first element of a pattern takes, and its length.
fn element(pattern: &[u8]) -> ([bool; 256], usize) {
    let mut takes = [false; 256];
    match *pattern {
        [b'?', ..] => ([true; 256], 1),
        [b'[', ref class @ ..] => {
            let negated = class.first() == Some(&b'^');
            let mut at = usize::from(negated);
            loop {
                match class[at.min(class.len())..] {
                    [b'\\', literal, ..] => {
                        takes[usize::from(literal)] = true;
                        at += 2;
                    }
                    [b']', ..] => {
                        at += 1;
                        break;
                    }
                    [low, b'-', high, ..] => {
                        (low.min(high)..=low.max(high)).for_each(|b| takes[usize::from(b)] = true);
                        at += 3;
                    }
                    [literal, ..] => {
                        takes[usize::from(literal)] = true;
                        at += 1;
                    }
                    [] => break,
                }
            }
            if negated {
                takes.iter_mut().for_each(|takes| *takes = !*takes);
            }
            (takes, 1 + at.min(class.len()))
        }
        [b'\\', literal, ..] => {
            takes[usize::from(literal)] = true;
            (takes, 2)
        }
        [literal, ..] => {
            takes[usize::from(literal)] = true;
            (takes, 1)
        }
        [] => (takes, 0),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// As one would write it down first, without a thought for time.
    fn naive(pattern: &[u8], text: &[u8]) -> bool {
        match pattern.first() {
            None => text.is_empty(),
            Some(b'*') => {
                naive(&pattern[1..], text) || (!text.is_empty() && naive(pattern, &text[1..]))
            }
            Some(_) => {
                let (takes, used) = element(pattern);
                text.first().is_some_and(|&byte| takes[usize::from(byte)])
                    && naive(&pattern[used..], &text[1..])
            }
        }
    }

    #[test]
    fn globs_match_as_in_redis() {
        for (pattern, text, expected) in [
            ("*", "", true),
            ("h?llo", "hello", true),
            ("h?llo", "hllo", false),
            ("h*llo", "heeeello", true),
            ("h[ae]llo", "hallo", true),
            ("h[ae]llo", "hillo", false),
            ("h[^e]llo", "hello", false),
            ("h[a-b]llo", "hbllo", true),
            ("tallyd:*", "tallyd:deltas", true),
            ("tallyd:*", "tally:deltas", false),
            ("a\\*b", "a*b", true),
            ("a\\*b", "axb", false),
            ("*a*b*c", "xxaxxbxxc", true),
            ("*a*b*c", "xxaxxcxxb", false),
            ("abc", "abcd", false),
            ("abcd", "abc", false),
            ("[", "a", false),
        ] {
            let glob = Glob::new(pattern.as_bytes()).unwrap();
            assert_eq!(glob.matches(text.as_bytes()), expected, "{pattern} {text}");
        }
    }

    #[test]
    fn a_pattern_is_taken_for_the_cheapest_thing_that_it_can_be() {
        let of = |text: &str| Glob::new(text.as_bytes()).unwrap().0;
        let bytes = |text: &str| text.as_bytes().into();
        assert_eq!(of("likes:*"), Kind::Prefix(bytes("likes:")));
        assert_eq!(of("*"), Kind::Prefix(bytes("")));
        assert_eq!(of("total"), Kind::Exact(bytes("total")));
        for text in ["a*b", "a?", "[ab]c", "\\*", "a\\*", "a**"] {
            assert!(matches!(of(text), Kind::Places(_)), "{text}");
        }
    }

    #[test]
    fn a_pattern_has_a_bound_and_up_to_it_every_place_counts() {
        let elements = |count: usize| [&b"?".repeat(count)[..], b"*b"].concat();
        for count in [1, 62, 63, 64, 126, 127, 128, 254] {
            let glob = Glob::new(&elements(count)).unwrap();
            let text = [&b"a".repeat(count)[..], b"xxb"].concat();
            assert!(glob.matches(&text), "{count}");
            assert!(!glob.matches(&text[3..]), "{count}");
        }
        assert_eq!(Glob::new(&elements(255)), Err(TooLong));
        assert!(Glob::new(&[&b"a".repeat(4095)[..], b"*"].concat()).is_ok());
        assert_eq!(Glob::new(&b"a".repeat(4097)), Err(TooLong));
    }

    proptest! {
        #[test]
        fn any_pattern_matches_as_the_naive_one_does(
            pattern in "[ab*?\\[\\]^\\\\-]{0,12}", text in "[ab\\[\\]^-]{0,10}",
        ) {
            let glob = Glob::new(pattern.as_bytes()).unwrap();
            prop_assert_eq!(glob.matches(text.as_bytes()), naive(pattern.as_bytes(), text.as_bytes()));
        }
    }
}
