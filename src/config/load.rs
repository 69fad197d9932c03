//! From the sources to a configuration that is valid.

use super::fault::{ConfigError, Fault};
use super::layers::Layers;
use super::source::{Environment, Flags, Origins};
use super::{Config, limits, password};

/// A valid configuration, and where each value of it came from.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// The configuration.
    pub config: Config,
    /// Where each key's value came from.
    pub origins: Origins,
}

pub(super) fn load(flags: &Flags, environment: &Environment) -> Result<Loaded, ConfigError> {
    let mut faults = Vec::new();
    let mut layers = Layers::new(environment);
    layers.push_file(flags, environment, &mut faults);
    layers.push_environment(environment, &mut faults);
    layers.push_flags(flags);

    let mut config = layers.extract(environment, &mut faults);
    let origins = layers.origins();
    // A bad value has made way for its default, which is within bounds and needs no second error.
    for fault in limits::check(&config) {
        faults.push(Fault::BadValue {
            key: fault.key.to_owned(),
            found: fault.found,
            expected: fault.expected,
            origin: origins.of(fault.key),
        });
    }
    match password::find(&config, &origins, environment) {
        Ok(Some(password)) => {
            config.store.url.set_password(&password);
            config.store.password = Some(password);
        }
        Ok(None) => {}
        Err(fault) => faults.push(fault),
    }
    match password::find_of_sentinels(&config, &origins, environment) {
        Ok(password) => config.store.sentinel_password = password,
        Err(fault) => faults.push(fault),
    }

    match ConfigError::of(faults) {
        Some(error) => Err(error),
        None => Ok(Loaded { config, origins }),
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::time::Duration;

    use super::super::{AdminListen, Delivery, LogLevel, Origin, RELOADABLE, StoreUrl};
    use super::*;

    /// A service run by root, with nothing configured.
    fn environment() -> Environment {
        Environment {
            root: true,
            host_name: "web-7".to_owned(),
            ..Environment::default()
        }
    }

    fn with_variables(variables: &[(&str, &str)]) -> Environment {
        let mut environment = environment();
        for (name, value) in variables {
            environment
                .variables
                .insert((*name).to_owned(), (*value).to_owned());
        }
        environment
    }

    /// A directory with this text as `tallyd.toml`, and the flags that name it.
    fn file(text: &str) -> (tempfile::TempDir, Flags) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("tallyd.toml");
        std::fs::write(&path, text).unwrap();
        let flags = Flags {
            config: Some(path),
            ..Flags::default()
        };
        (directory, flags)
    }

    fn load_file(text: &str) -> Result<Loaded, ConfigError> {
        let (_directory, flags) = file(text);
        load(&flags, &environment())
    }

    /// What is wrong with a file, a line each, its path shortened.
    fn faults(text: &str) -> Vec<String> {
        let (directory, flags) = file(text);
        let error = load(&flags, &environment()).unwrap_err();
        let prefix = format!("{}/", directory.path().display());
        let faults = error.faults().iter();
        faults.map(|f| f.to_string().replace(&prefix, "")).collect()
    }

    #[test]
    fn with_no_source_the_defaults_hold() {
        let loaded = load(&Flags::default(), &environment()).unwrap();
        assert_eq!(loaded.config, Config::defaults(&environment()));
        let socket = Path::new("/run/tallyd/tallyd.sock");
        assert_eq!(loaded.config.listen.socket, socket);
        assert_eq!(loaded.config.node.name, "web-7");
        let default = Origin::Default { variable: None };
        assert_eq!(loaded.origins.of("flush.interval"), default);
    }

    #[test]
    fn a_stronger_source_wins_and_every_origin_is_kept() {
        let (_directory, mut flags) = file(
            "[flush]\ninterval = \"2s\"\nmax_keys = 5000\n\n[log]\nlevel = \"warn\"\n\n\
             [limits]\nmax_view_bytes = 2097152\n",
        );
        flags.log_level = Some("trace".to_owned());
        let environment = with_variables(&[
            ("TALLYD_FLUSH__INTERVAL", "3s"),
            ("TALLYD_LOG__LEVEL", "debug"),
            ("TALLYD_LISTEN__MODE", "0600"),
            ("TALLYD_PUBLISH__ENABLED", "false"),
            ("TALLYD_NODE__NAME", "42"),
            ("TALLYD_LISTEN__ALLOW_UIDS", "33"),
            ("TALLYD_LIMITS__ALLOW_KEYS", "likes:*,views:*"),
            ("TALLYD_LIMITS__MAX_PENDING_BYTES", "1048576"),
        ]);
        let Loaded { config, origins } = load(&flags, &environment).unwrap();
        assert_eq!(config.flush.interval, Duration::from_secs(3));
        assert_eq!(config.flush.max_keys, 5_000);
        assert_eq!(config.log.level, LogLevel::Trace);
        assert_eq!(config.listen.mode, 0o600);
        assert!(!config.publish.enabled);
        assert_eq!(config.node.name, "42");
        assert_eq!(config.listen.allow_uids, ["33"]);
        assert_eq!(config.limits.allow_keys, ["likes:*", "views:*"]);
        assert_eq!(config.limits.max_view_bytes, 2 << 20);
        assert_eq!(config.limits.max_pending_bytes, 1 << 20);
        assert_eq!(origins.of("log.level").to_string(), "flag --log-level");
        assert_eq!(
            origins.of("flush.interval").to_string(),
            "env TALLYD_FLUSH__INTERVAL"
        );
        let path = flags.config.unwrap();
        assert_eq!(
            origins.of("flush.max_keys"),
            Origin::File {
                path,
                line: Some(3)
            }
        );
    }

    #[test]
    fn every_flag_sets_its_key() {
        let flags = Flags {
            config: None,
            state_dir: Some("/s".to_owned()),
            socket: Some("/r/t.sock".to_owned()),
            store: Some("redis+unix:///run/redis.sock".to_owned()),
            flush_interval: Some("250ms".to_owned()),
            admin: Some("unix:/r/a.sock".to_owned()),
            log_level: Some("error".to_owned()),
        };
        let config = load(&flags, &environment()).unwrap().config;
        assert_eq!(config.node.state_dir, Path::new("/s"));
        assert_eq!(config.listen.socket, Path::new("/r/t.sock"));
        assert_eq!(config.store.url.to_string(), "redis+unix:///run/redis.sock");
        assert_eq!(config.flush.interval, Duration::from_millis(250));
        let admin = AdminListen::Unix(PathBuf::from("/r/a.sock"));
        assert_eq!(config.admin.listen, Some(admin));
        assert_eq!(config.log.level, LogLevel::Error);
    }

    #[test]
    fn all_that_is_wrong_is_reported_at_once() {
        assert_eq!(
            faults(
                "[flush]\ninterval = 5\ndelivery = 0\nmax_keys = -1\n\n\
                 [listen]\nmode = 660\n\n[publish]\nenabled = \"yes\"\n\n\
                 [limits]\nmax_key_bytes = \"1KB\"\nallow_keys = [\"a\", true]\n"
            ),
            [
                "flush.delivery: is 0; expected \"exactly-once\" or \"at-least-once\" \
                 (file tallyd.toml:3)",
                "flush.interval: is 5; expected a duration of at most \"365d\" with its unit, such \
                 as \"1s\", \"50ms\" or \"2m\" (file tallyd.toml:2)",
                "flush.max_keys: is -1; expected a whole number (file tallyd.toml:4)",
                "limits.allow_keys: is true; expected a list of names, such as [\"a\", \"b\"], or \
                 text with commas, such as \"a,b\" (file tallyd.toml:14)",
                "limits.max_key_bytes: is \"1KB\"; expected a size in bytes, such as 65536, \
                 \"1KiB\" or \"256MiB\" (file tallyd.toml:13)",
                "listen.mode: is 660; expected permissions as octal digits in quotes, such as \
                 \"0660\" (file tallyd.toml:7)",
                "publish.enabled: is \"yes\"; expected true or false (file tallyd.toml:10)",
            ]
        );
    }

    #[test]
    fn an_unknown_key_is_an_error_that_says_what_there_is() {
        assert_eq!(
            faults("[journal]\nsink = \"always\"\n[jurnal]\nsync = \"always\"\n"),
            [
                "journal.sink: unknown key; [journal] has sync (file tallyd.toml:2)",
                "jurnal: unknown key; the sections are node, listen, store, flush, journal, \
                 publish, reply, view, limits, admin, log, shutdown (file tallyd.toml:3)",
            ]
        );
    }

    #[test]
    fn an_unknown_variable_is_an_error_but_not_one_of_an_orchestrator() {
        let environment = with_variables(&[
            ("TALLYD_FLUSH__INTERVALL", "1s"),
            ("TALLYD_LOG_LEVEL", "debug"),
            ("TALLYD_PORT", "tcp://10.0.0.1:6379"),
            ("TALLYD_SERVICE_HOST", "10.0.0.1"),
        ]);
        let error = load(&Flags::default(), &environment).unwrap_err();
        assert_eq!(
            error.to_string(),
            "flush.intervall: unknown key; [flush] has interval, max_keys, batch_keys, delivery, \
             retain, max_retained_bytes, replicas, replicas_timeout (env TALLYD_FLUSH__INTERVALL)\n\
             log.level: unknown key; the variable is TALLYD_LOG__LEVEL (env TALLYD_LOG_LEVEL)"
        );
    }

    #[test]
    fn a_bad_value_names_the_variable_or_flag_that_it_came_from() {
        let flags = Flags {
            flush_interval: Some("5".to_owned()),
            ..Flags::default()
        };
        let environment = with_variables(&[("TALLYD_FLUSH__BATCH_KEYS", "many")]);
        let text = load(&flags, &environment).unwrap_err().to_string();
        assert!(text.contains("flush.interval: is \"5\"; "), "{text}");
        assert!(text.contains("(flag --flush-interval)"), "{text}");
        assert!(text.contains("flush.batch_keys: is \"many\"; "), "{text}");
        assert!(text.contains("(env TALLYD_FLUSH__BATCH_KEYS)"), "{text}");
    }

    #[test]
    fn a_bad_value_under_a_good_one_is_not_asked_for() {
        let (_directory, mut flags) = file("[log]\nlevel = \"loud\"\n");
        flags.log_level = Some("info".to_owned());
        assert!(load(&flags, &environment()).is_ok());
    }

    #[test]
    fn bounds_name_the_key_and_its_origin() {
        assert_eq!(
            faults("flush.batch_keys = 1000\nflush.max_keys = 999\n"),
            [
                "flush.batch_keys: is 1000; expected at most flush.max_keys, which is 999 \
              (file tallyd.toml:1)"
            ]
        );
        let empty = Environment::default();
        let text = load(&Flags::default(), &empty).unwrap_err().to_string();
        assert!(text.starts_with("node.state_dir: is empty; "), "{text}");
        assert!(text.contains("listen.socket: is empty; "), "{text}");
        assert!(text.contains("$XDG_RUNTIME_DIR"), "{text}");
    }

    #[test]
    fn a_file_that_was_asked_for_has_to_be_there_and_be_toml() {
        let flags = Flags {
            config: Some(PathBuf::from("/nonexistent/x.toml")),
            ..Flags::default()
        };
        let error = load(&flags, &environment()).unwrap_err();
        let [fault @ Fault::UnreadableFile { .. }] = error.faults() else {
            panic!("{error}");
        };
        let text = "/nonexistent/x.toml: cannot read the configuration file";
        assert_eq!(fault.to_string(), text);

        let faults = faults("[flush]\n\ninterval = = \"hunter2\"\n");
        assert_eq!(faults.len(), 1);
        assert!(faults[0].starts_with("not TOML: "), "{faults:?}");
        assert!(faults[0].ends_with("(file tallyd.toml:3)"), "{faults:?}");
        assert!(!faults[0].contains("hunter2"), "{faults:?}");
    }

    #[test]
    fn a_value_where_a_section_belongs_is_an_error_and_the_other_way_round() {
        assert_eq!(
            faults("store = \"redis://:hunter2@h\"\nx = 1\n[flush.interval]\n"),
            [
                "store: is a single value; expected a table, [store] (file tallyd.toml:1)",
                "x: unknown key; the sections are node, listen, store, flush, journal, publish, \
                 reply, view, limits, admin, log, shutdown (file tallyd.toml:2)",
                "flush.interval: is a table; expected a duration of at most \"365d\" with its \
                 unit, such as \"1s\", \"50ms\" or \"2m\" (file tallyd.toml:3)",
            ]
        );
    }

    #[test]
    fn a_key_has_its_line_however_it_is_written() {
        assert_eq!(
            faults(
                "log = { level = \"loud\" } # level\nview.\"max_age\" = \"\"\n\n[flush]\n\
                 note = \"\"\"\ninterval = 1\n\"\"\"\n'interval' = 2026-01-01\n\
                 max_keys = 99999999999999999999\n"
            ),
            [
                "flush.note: unknown key; [flush] has interval, max_keys, batch_keys, delivery, \
                 retain, max_retained_bytes, replicas, replicas_timeout (file tallyd.toml:5)",
                "flush.max_keys: is a number beyond 64 bits; expected a smaller number \
                 (file tallyd.toml:9)",
                "flush.interval: is a date; expected a duration of at most \"365d\" with its \
                 unit, such as \"1s\", \"50ms\" or \"2m\" (file tallyd.toml:8)",
                "log.level: is \"loud\"; expected \"error\", \"warn\", \"info\", \"debug\" or \
                 \"trace\" (file tallyd.toml:1)",
                "view.max_age: is \"\"; expected a duration of at most \"365d\" with its unit, \
                 such as \"1s\", \"50ms\" or \"2m\" (file tallyd.toml:2)",
            ]
        );
    }

    #[test]
    fn a_bad_value_under_a_bad_one_is_reported_as_well() {
        let (_directory, mut flags) = file("[log]\nlevel = \"loud\"\n");
        flags.log_level = Some("louder".to_owned());
        let error = load(&flags, &environment()).unwrap_err();
        assert_eq!(error.faults().len(), 2, "{error}");
    }

    #[test]
    fn the_password_comes_from_the_file_then_the_url_then_the_credentials() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("password");
        std::fs::write(&path, "from file\r\n").unwrap();
        let credential = directory.path().join("tallyd-store-password");
        std::fs::write(credential, "from credential\n").unwrap();
        let credentials = directory.path().to_str().unwrap();
        let path = path.to_str().unwrap();

        let password = |url: &str, file: &str, credentials: &str| {
            let environment = with_variables(&[
                ("TALLYD_STORE__URL", url),
                ("TALLYD_STORE__PASSWORD_FILE", file),
                ("CREDENTIALS_DIRECTORY", credentials),
            ]);
            let store = load(&Flags::default(), &environment).unwrap().config.store;
            let used = store
                .url
                .login()
                .and_then(|login| login.password().map(str::to_owned));
            let kept = store.password.map(|secret| secret.expose().to_owned());
            assert_eq!(used, kept);
            used
        };
        let of_url = "redis://:from-url@h";
        assert_eq!(password(of_url, path, credentials).unwrap(), "from file");
        assert_eq!(password(of_url, "", credentials).unwrap(), "from-url");
        assert_eq!(
            password("redis://h", "", credentials).unwrap(),
            "from credential"
        );
        assert_eq!(password("redis://h", "", ""), None);
        assert_eq!(password("redis://h", "", "/nonexistent"), None);
        assert_eq!(password("embedded", path, credentials), None);
    }

    #[test]
    fn the_sentinels_have_a_password_of_their_own() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("password");
        std::fs::write(&path, "from file\n").unwrap();
        let credential = directory.path().join("tallyd-sentinel-password");
        std::fs::write(credential, "from credential\n").unwrap();
        let credentials = directory.path().to_str().unwrap();
        let password = |url: &str, file: &str, credentials: &str| {
            let environment = with_variables(&[
                ("TALLYD_STORE__URL", url),
                ("TALLYD_STORE__SENTINEL_PASSWORD_FILE", file),
                ("CREDENTIALS_DIRECTORY", credentials),
            ]);
            let store = load(&Flags::default(), &environment).unwrap().config.store;
            let master = store.password.map(|secret| secret.expose().to_owned());
            let sentinel = store.sentinel_password;
            (master, sentinel.map(|secret| secret.expose().to_owned()))
        };
        let text = |text: &str| Some(text.to_owned());
        let (path, url) = (path.to_str().unwrap(), "redis+sentinel://:of-master@h/m");
        let masters = text("of-master");
        assert_eq!(
            password(url, path, credentials),
            (masters.clone(), text("from file"))
        );
        assert_eq!(
            password(url, "", credentials),
            (masters.clone(), text("from credential"))
        );
        assert_eq!(password(url, "", ""), (masters, None));
        assert_eq!(password("redis://h", path, ""), (None, None));

        let environment = with_variables(&[
            ("TALLYD_STORE__URL", url),
            ("TALLYD_STORE__SENTINEL_PASSWORD_FILE", "/nonexistent/p"),
        ]);
        let error = load(&Flags::default(), &environment).unwrap_err();
        let text = error.to_string();
        let named = "store.sentinel_password_file: cannot read /nonexistent/p (env ";
        assert!(text.starts_with(named), "{text}");
    }

    #[test]
    fn a_password_file_that_cannot_be_read_is_an_error_that_names_it() {
        let environment = with_variables(&[
            ("TALLYD_STORE__URL", "redis://h"),
            ("TALLYD_STORE__PASSWORD_FILE", "/nonexistent/p"),
        ]);
        let error = load(&Flags::default(), &environment).unwrap_err();
        assert_eq!(
            error.to_string(),
            "store.password_file: cannot read /nonexistent/p (env TALLYD_STORE__PASSWORD_FILE)"
        );
    }

    #[test]
    fn no_error_and_no_printed_configuration_holds_a_password() {
        for text in [
            "[store]\nurl = \"redis://joe:hunter2@h:x\"\n",
            "[store]\nurl = [\"redis://joe:hunter2@h\"]\n",
            "[store]\npassword = \"hunter2\"\n",
            "[store]\nurl = \"hunter2\n",
        ] {
            let error = load_file(text).unwrap_err();
            assert!(!format!("{error} {error:?}").contains("hunter2"), "{error}");
        }
        let loaded = load_file("[store]\nurl = \"redis://joe:hunter2@h\"\n").unwrap();
        let printed = format!("{loaded:?} {:?}", loaded.config.written());
        assert!(!printed.contains("hunter2"), "{printed}");
        assert!(printed.contains("redis://joe:***@h:6379"), "{printed}");
    }

    /// The example file with every key uncommented.
    fn example() -> String {
        include_str!("../../config/tallyd.toml")
            .lines()
            .map(|line| match line.strip_prefix('#') {
                // "# text" is a comment, "#key = value" a default.
                Some(key) if !key.is_empty() && !key.starts_with(' ') => format!("{key}\n"),
                _ => format!("{line}\n"),
            })
            .collect()
    }

    #[test]
    fn the_example_file_shows_every_key_with_its_default() {
        let Loaded { config, origins } = load_file(&example()).unwrap();
        assert_eq!(config, Config::defaults(&environment()));
        for (key, _) in config.written() {
            let origin = origins.of(&key);
            assert!(
                matches!(origin, Origin::File { line: Some(_), .. }),
                "{key} is missing: {origin}"
            );
        }
        for key in RELOADABLE {
            assert!(
                config.written().iter().any(|(name, _)| name == key),
                "{key}"
            );
        }
    }

    #[test]
    fn the_example_file_as_it_is_sets_nothing() {
        let Loaded { config, origins } =
            load_file(include_str!("../../config/tallyd.toml")).unwrap();
        for (key, _) in config.written() {
            assert_eq!(
                origins.of(&key),
                Origin::Default { variable: None },
                "{key}"
            );
        }
        assert_eq!(config.store.url, StoreUrl::Embedded);
        assert_eq!(config.flush.delivery, Delivery::ExactlyOnce);
    }
}
