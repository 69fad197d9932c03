//! What may be shown of what a server says: without the password, on one line, and not too long.
//!
//! A server, or whoever answers at its address, may repeat what it was sent, whole, cut off or escaped.
//! All texts of servers pass through here before they become an error that somebody reads.
//!
//! 1. Neither the password nor a beginning of it of [`BEGINNING_BYTES`] is shown, as it is, as a URL
//!    has it, or as it is escaped in logs.
//! 2. A password of fewer than [`SHORT_BYTES`] is in many texts by chance, and masks would give it away:
//!    a text that has it is withheld whole.
//! 3. A line of a server has at most [`SHOWN_BYTES_MAX`] bytes and a mark that it was cut.

use std::borrow::Cow;
use std::fmt;

use super::server_error::code;

/// The longest text shown, in bytes.
pub(super) const SHOWN_BYTES_MAX: usize = 256;
/// So much of a text is looked at.
const LOOKED_AT_BYTES: usize = 4096;
/// A text that ends in the middle of the password shows no more of it than this.
const BEGINNING_BYTES: usize = 6;
/// See invariant 2.
const SHORT_BYTES: usize = 4;
const MASK: &[u8] = b"***";
const WITHHELD: &str = "the server's words are not shown: they hold the store's password";

/// See the module's documentation.
#[derive(Clone, Default)]
pub(super) struct Shown {
    /// The password in each form in which it may come back.
    forms: Vec<Vec<u8>>,
    is_short: bool,
}

impl fmt::Debug for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Shown(***)")
    }
}

impl Shown {
    /// Hides this password.
    pub(super) fn without(password: Option<&str>) -> Self {
        let password = password.unwrap_or_default();
        if password.is_empty() {
            return Self::default();
        }
        let encoded = |hex: fn(u8) -> String, kept: &[u8]| -> Vec<u8> {
            let mut text = String::new();
            for byte in password.bytes() {
                if byte.is_ascii_alphanumeric() || kept.contains(&byte) {
                    text.push(char::from(byte));
                } else {
                    text.push_str(&hex(byte));
                }
            }
            text.into_bytes()
        };
        let (upper, lower) = (|b| format!("%{b:02X}"), |b| format!("%{b:02x}"));
        let mut forms = vec![
            password.as_bytes().to_vec(),
            encoded(upper, b""),
            encoded(upper, b"-._~"),
            encoded(lower, b"-._~"),
            password.as_bytes().escape_ascii().to_string().into_bytes(),
            password.escape_debug().to_string().into_bytes(),
        ];
        // The longest first: one form may hold another.
        forms.sort_by(|a, b| b.len().cmp(&a.len()).then_with(|| a.cmp(b)));
        forms.dedup();
        Self {
            forms,
            is_short: password.len() < SHORT_BYTES,
        }
    }

    /// A server's line, as it may be shown or kept.
    pub(super) fn line<'l>(&self, line: &'l [u8]) -> Cow<'l, [u8]> {
        if line.len() <= SHOWN_BYTES_MAX
            && !line.iter().any(u8::is_ascii_control)
            && !(0..line.len()).any(|at| self.secret_at(&line[at..]).is_some())
        {
            return Cow::Borrowed(line);
        }
        Cow::Owned(self.shown(line, SHOWN_BYTES_MAX))
    }

    /// A text of ours that a server's words, bounded, are part of.
    pub(super) fn text(&self, text: &str) -> String {
        String::from_utf8_lossy(&self.shown(text.as_bytes(), LOOKED_AT_BYTES)).into_owned()
    }

    fn shown(&self, line: &[u8], bytes_max: usize) -> Vec<u8> {
        let is_long = line.len() > LOOKED_AT_BYTES;
        let line = &line[..line.len().min(LOOKED_AT_BYTES)];
        let mut shown = Vec::new();
        let mut at = 0;
        while at < line.len() {
            match self.secret_at(&line[at..]) {
                Some(_) if self.is_short => return self.withheld(line),
                Some(bytes) => {
                    shown.extend_from_slice(MASK);
                    at += bytes;
                }
                None => {
                    shown.push(if line[at].is_ascii_control() {
                        b' '
                    } else {
                        line[at]
                    });
                    at += 1;
                }
            }
        }
        if is_long {
            // It may end in a beginning of the password that is too short to be told.
            shown.truncate(shown.len().saturating_sub(BEGINNING_BYTES));
        }
        if is_long || shown.len() > bytes_max {
            shown.truncate(bytes_max);
            shown.extend_from_slice(b"... (cut)");
        }
        shown
    }

    /// With the error's code, which says what to do, where it is one.
    fn withheld(&self, line: &[u8]) -> Vec<u8> {
        let text = String::from_utf8_lossy(line);
        let code = code(&text);
        let is_code = (3..=16).contains(&code.len())
            && code.bytes().all(|byte| byte.is_ascii_uppercase())
            && !(0..code.len()).any(|at| self.secret_at(&code.as_bytes()[at..]).is_some());
        let code = if is_code { code } else { "ERR" };
        format!("{code} {WITHHELD}").into_bytes()
    }

    /// How many bytes at the front of `text` are the password, or a beginning of it.
    fn secret_at(&self, text: &[u8]) -> Option<usize> {
        let common = |form: &Vec<u8>| {
            let pairs = form.iter().zip(text);
            let common = pairs.take_while(|(a, b)| a == b).count();
            (common >= form.len().min(BEGINNING_BYTES)).then_some(common)
        };
        self.forms.iter().filter_map(common).max()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn shown(password: &str, text: &str) -> String {
        Shown::without(Some(password)).text(text)
    }

    #[test]
    fn a_password_is_masked_as_it_is_encoded_escaped_and_cut_off() {
        let password = "p@ss\"w/ord#1";
        for text in [
            "ERR AUTH p@ss\"w/ord#1 is wrong",
            "ERR AUTH p%40ss%22w%2Ford%231 is wrong",
            "ERR AUTH p%40ss%22w%2ford%231 is wrong",
            "ERR AUTH p@ss\\\"w/ord#1 is wrong",
            "ERR AUTH p@ss\"w is wrong",
        ] {
            assert_eq!(shown(password, text), "ERR AUTH *** is wrong", "{text}");
        }
        assert_eq!(shown(password, "ERR p@ss is a word"), "ERR p@ss is a word");
        assert_eq!(Shown::without(None).text("ERR AUTH x"), "ERR AUTH x");
        assert_eq!(
            format!("{:?}", Shown::without(Some(password))),
            "Shown(***)"
        );
    }

    #[test]
    fn a_short_password_is_not_given_away_by_masks() {
        assert_eq!(shown("a", "WRONGPASS a b"), format!("WRONGPASS {WITHHELD}"));
        assert_eq!(shown("R", "WRONGPASS R"), format!("ERR {WITHHELD}"));
        assert_eq!(shown("zz", "WRONGPASS a b"), "WRONGPASS a b");
    }

    #[test]
    fn a_long_text_is_cut_and_stays_on_one_line() {
        let hide = Shown::without(Some("hunter2"));
        let long = hide.line(&vec![b'x'; 900_000]).into_owned();
        assert_eq!(
            String::from_utf8(long).unwrap(),
            format!("{}... (cut)", "x".repeat(SHOWN_BYTES_MAX))
        );
        // Where the cut is, the password may be.
        let edge = format!("{}hunter2", "x".repeat(LOOKED_AT_BYTES - 3));
        assert!(!shown("hunter2", &edge).contains("hun"));
        assert_eq!(shown("hunter2", "ERR a\nb\tc"), "ERR a b c");
    }

    proptest! {
        #[test]
        fn no_text_shows_the_password(
            password in "[ -~]{4,20}", before in "[ -~]{0,300}", after in "[ -~]{0,40}"
        ) {
            let text = format!("{before}{password}{after}");
            let shown = shown(&password, &text);
            // The mask itself may be part of a password.
            let shown = shown.replace("***", "").replace("... (cut)", "");
            prop_assert!(!shown.contains(&password) || before.contains(&password[1..]) || password.contains('*'), "{shown}");
        }
    }
}
