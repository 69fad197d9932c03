//! Settings that are one of a few words.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// An enum whose variants are written as words.
///
/// Not serde's derive: figment lets a number stand for a derived enum's variant, and
/// `delivery = 0` must be an error.
macro_rules! choice {
    (
        $(#[$meta:meta])*
        $name:ident, $expected:literal {
            $( $(#[$variant_meta:meta])* $variant:ident = $word:literal, )+
        }
    ) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name {
            $( $(#[$variant_meta])* $variant, )+
        }

        impl $name {
            /// The word in the configuration.
            pub const fn word(self) -> &'static str {
                match self {
                    $( Self::$variant => $word, )+
                }
            }

            /// The choice that a word stands for.
            pub fn from_word(word: &str) -> Option<Self> {
                match word {
                    $( $word => Some(Self::$variant), )+
                    _ => None,
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.word())
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.word())
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                super::text::deserialize(deserializer, $expected, Self::from_word)
            }
        }
    };
}

choice! {
    /// How a batch reaches the store.
    Delivery, r#""exactly-once" or "at-least-once""# {
        /// In a transaction that carries the node's token: no retry counts twice.
        ExactlyOnce = "exactly-once",
        /// As a plain pipeline, for proxies that refuse `MULTI`: a retry after a lost reply may
        /// count twice.
        AtLeastOnce = "at-least-once",
    }
}

choice! {
    /// When the journal is forced to the disk. It survives `kill -9` with any of them; this is
    /// about power cuts.
    SyncPolicy, r#""interval", "always" or "never""# {
        /// With each seal: a power cut loses at most one `flush.interval`.
        Interval = "interval",
        /// Before the reply, one sync for a group of commands: a power cut loses nothing
        /// acknowledged.
        Always = "always",
        /// When the kernel likes.
        Never = "never",
    }
}

choice! {
    /// What the reply to the first `INCR` of a key on this node counts from.
    Cold, r#""load" or "delta""# {
        /// The store's value, read first; waits at most `reply.load_timeout`.
        Load = "load",
        /// What is pending here alone; never waits.
        Delta = "delta",
    }
}

choice! {
    /// What a read is answered when the store has not told the value in time.
    OnTimeout, r#""error" or "nil""# {
        /// An error that clients try again after.
        Error = "error",
        /// As if there were no such key.
        Nil = "nil",
    }
}

choice! {
    /// The least severe lines that are logged.
    LogLevel, r#""error", "warn", "info", "debug" or "trace""# {
        /// Something failed and needs somebody.
        Error = "error",
        /// Something is wrong, and is being dealt with.
        Warn = "warn",
        /// Rare events of the daemon's life.
        Info = "info",
        /// What each stage does.
        Debug = "debug",
        /// Everything.
        Trace = "trace",
    }
}

choice! {
    /// How log lines look.
    LogFormat, r#""auto", "text" or "json""# {
        /// Coloured text on a terminal, lines with a priority under systemd, plain text else.
        Auto = "auto",
        /// Text, coloured on a terminal.
        Text = "text",
        /// One JSON object a line.
        Json = "json",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_choice_is_read_back_from_its_word() {
        for choice in [Delivery::ExactlyOnce, Delivery::AtLeastOnce] {
            assert_eq!(Delivery::from_word(choice.word()), Some(choice));
        }
        for choice in [SyncPolicy::Interval, SyncPolicy::Always, SyncPolicy::Never] {
            assert_eq!(SyncPolicy::from_word(choice.word()), Some(choice));
        }
        assert_eq!(Delivery::from_word("ExactlyOnce"), None);
        assert_eq!(Cold::from_word(""), None);
    }

    #[test]
    fn a_number_is_not_a_choice() {
        let error = figment::value::Value::from(0)
            .deserialize::<Cold>()
            .unwrap_err();
        assert!(
            error.to_string().contains("\"load\" or \"delta\""),
            "{error}"
        );
    }
}
