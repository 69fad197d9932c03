//! A configuration file: taken, or refused with what is wrong; what was taken is written and taken again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tallyd::config::{Config, Environment, Flags};

thread_local! {
    static DIR: tempfile::TempDir = tempfile::tempdir_in("/dev/shm").expect("a directory in memory");
}

fuzz_target!(|bytes: &[u8]| {
    DIR.with(|dir| {
        let path = dir.path().join("tallyd.toml");
        std::fs::write(&path, bytes).expect("a file in memory");
        let flags = Flags {
            config: Some(path),
            ..Flags::default()
        };
        let environment = Environment {
            root: true,
            ..Environment::default()
        };
        match Config::load(&flags, &environment) {
            Ok(loaded) => assert!(!loaded.config.written().is_empty()),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    });
});
